"""What can go wrong, as types. One tree, one file.

ViewmeshError              has a code, a sentence and (often) a hint
├── InputError             the caller's data: says what is wrong, where, and what would be right
│   └── PoseError          views that structure from motion could not pose
├── OptionError            an option or a configuration value that cannot be honoured
├── MissingModel           weights or an optional package are not there; the hint is the command that gets them
├── OutOfMemory            what is needed and what is free, in bytes
├── EmptyReconstruction    nothing was left to mesh
├── InvalidMesh            an output failed validation
└── Cancelled              somebody asked for it
"""


class ViewmeshError(Exception):
    """Base of every error that a user should see.

    `code` is stable and machine-readable, `str(error)` is one sentence, `hint` says what would be right.
    """

    code = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __reduce__(self):  # keyword-only arguments do not survive pickling (Ray, multiprocessing) by default
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[ViewmeshError], args: tuple, state: dict) -> ViewmeshError:
    error = kind.__new__(kind)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


class InputError(ViewmeshError):
    """The given view set, file or mesh cannot be used. `file` names the offending file as the user knows it."""

    code = "invalid_input"

    def __init__(self, message: str, *, file: str = "", hint: str = "") -> None:
        super().__init__(f"{file}: {message}" if file else message, hint=hint)
        self.file = file


class PoseError(InputError):
    """Structure from motion left out too many views; `unposed` names them."""

    code = "unposed_views"

    def __init__(self, message: str, *, unposed: tuple[str, ...] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.unposed = unposed


class OptionError(ViewmeshError):
    """An option's value is unknown or out of range."""

    code = "invalid_option"


class MissingModel(ViewmeshError):
    """Weights or an optional package are missing; `hint` is the command that gets them."""

    code = "model_missing"


class OutOfMemory(ViewmeshError):
    """`needed` and `free` in bytes, `device` as torch names it."""

    code = "out_of_memory"

    def __init__(self, what: str, *, needed: int, free: int, device: str, hint: str = "") -> None:
        super().__init__(
            f"{what} needs about {needed / 2**30:.1f} GiB on {device}, {free / 2**30:.1f} GiB are free.",
            hint=hint,
        )
        self.needed, self.free, self.device = needed, free, device


class EmptyReconstruction(ViewmeshError):
    """Nothing was left to mesh: masks that agree on no volume, or a model that produced no surface."""

    code = "empty_reconstruction"


class InvalidMesh(ViewmeshError):
    """A mesh failed validation; the sentence names the first fault."""

    code = "invalid_mesh"


class Cancelled(ViewmeshError):
    """The work was cancelled between two steps."""

    code = "cancelled"
