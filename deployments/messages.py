"""What a stage says while it works: Progress, any number of times, then one Done or one Failed.

They cross process boundaries, so they are plain values; that a job failed is a value too, because an exception that
leaves a replica cannot be told apart from the replica's own death.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` in a stage; `metrics` such as loss and psnr."""

    stage: str
    step: int
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """The stage's result: JSON values and references to committed files, never big arrays."""

    value: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """`retry`: another replica may do better (a lost device), the job itself is not at fault."""

    code: str
    message: str
    hint: str = ""
    retry: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "hint": self.hint, "details": self.details}


Message = Progress | Done | Failed
