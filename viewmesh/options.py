"""What a caller may ask for: one model for the command line, the service's `options` field and the library."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from viewmesh.errors import OptionError

ModelName = Literal["auto", "nvdiffrec", "trellis", "reconviagen"]
PresetName = Literal["preview", "standard", "high"]
Format = Literal["glb", "obj", "ply", "stl", "usdz", "gaussian_ply"]
GAUSSIAN_PLY = "gaussian_ply"
NO_EFFECT = {"nvdiffrec": ("refine", "steps", "cfg", "multiimage_mode"), "reconviagen": ("multiimage_mode",)}
UpAxis = Literal["auto", "+x", "-x", "+y", "-y", "+z", "-z"]


class ViewRules(BaseModel):
    """How the view set's cameras and masks are found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cameras: Literal["auto", "file", "canonical6", "sfm", "none"] = Field(
        default="auto",
        description="Where poses come from; auto: a camera file, else the rig, else structure from motion.",
    )
    rig: Literal["canonical6"] | None = Field(
        default=None,
        description="Six views named view_00..05 are front, right, back, left, top, bottom of the canonical rig.",
    )
    mask: Literal["auto", "masks", "alpha", "rembg", "grabcut", "none"] = Field(
        default="auto",
        description="Where masks come from; auto: masks/, else alpha, else rembg if installed, else GrabCut.",
    )
    up: UpAxis = Field(
        default="auto", description="Which axis of the input's world is up; auto: nearest the cameras' mean up."
    )
    depth_unit_scale: float | None = Field(
        default=None,
        gt=0,
        le=1e3,
        description="World units per step of the depth PNGs; null: the camera file's, else 0.001.",
    )


class Options(BaseModel):
    """Everything one reconstruction can be told. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelName = "auto"
    refine: bool = Field(
        default=False, description="Optimise a generative model's mesh against the views; kept only if better."
    )
    preset: PresetName = "preview"
    seed: int = Field(default=0, ge=0, lt=2**63)
    target_faces: int | None = Field(
        default=None, ge=100, le=1_000_000, description="Triangles of the result; null: the preset's."
    )
    texture_size: int | None = Field(default=None, ge=256, le=4096, description="A power of two; null: the preset's.")
    formats: Annotated[tuple[Format, ...], Field(min_length=1)] = ("glb", "obj", "ply")
    steps: int | None = Field(default=None, ge=1, le=100, description="Sampler steps of a generative model.")
    cfg: float | None = Field(default=None, ge=0, le=20, description="Guidance strength of a generative model.")
    multiimage_mode: Literal["stochastic", "multidiffusion"] = "stochastic"
    views: ViewRules = ViewRules()

    def for_model(self, model: str) -> "Options":
        """The same options with the model that runs. Raises OptionError for what that model cannot do."""
        if model == "nvdiffrec" and GAUSSIAN_PLY in self.formats:
            raise OptionError(
                f"The format {GAUSSIAN_PLY} is not one that nvdiffrec can make: it has no Gaussians.",
                hint="Use the model trellis or reconviagen, or leave the format out.",
            )
        return self.model_copy(update={"model": model})

    def ineffective(self) -> tuple[str, ...]:
        """A sentence for each option that was asked for and that the model knows nothing of."""
        fields = type(self).model_fields
        asked = [name for name in NO_EFFECT.get(self.model, ()) if getattr(self, name) != fields[name].default]
        return tuple(f"The option {name} has no effect with {self.model}." for name in asked)

    @property
    def view_rules(self) -> ViewRules:
        """How views are read for the model: a generative one needs cameras only to refine its mesh."""
        if self.model in ("auto", "nvdiffrec") or self.refine:
            return self.views
        return self.views.model_copy(update={"cameras": "none", "rig": None})

    @field_validator("texture_size")
    @classmethod
    def _power_of_two(cls, value: int | None) -> int | None:
        if value is not None and value & (value - 1):
            raise ValueError(f"texture_size must be a power of two (512, 1024, 2048, 4096), got {value}")
        return value
