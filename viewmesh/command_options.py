"""The options of a reconstruction on a command line: declared once, for every command that takes them."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from viewmesh.errors import OptionError

if TYPE_CHECKING:
    from viewmesh.options import Options


def wishes(
    model: Annotated[str, typer.Option(help="auto, nvdiffrec, trellis or reconviagen.")] = "auto",
    refine: Annotated[
        bool, typer.Option("--refine", help="Optimise a generative model's mesh against the views.")
    ] = False,
    preset: Annotated[str, typer.Option(help="preview, standard or high.")] = "preview",
    seed: Annotated[int, typer.Option(help="Same seed: same result on a CPU, about the same on a GPU.")] = 0,
    target_faces: Annotated[int | None, typer.Option(help="Triangles of the result.")] = None,
    texture_size: Annotated[int | None, typer.Option(help="Side of the texture, a power of two.")] = None,
    formats: Annotated[str, typer.Option(help="Any of glb,obj,ply,stl,usdz,gaussian_ply.")] = "glb,obj,ply",
    rig: Annotated[str | None, typer.Option(help="canonical6: front, right, back, left, top, bottom.")] = None,
    cameras: Annotated[str, typer.Option(help="auto, file, canonical6, sfm or none.")] = "auto",
    mask: Annotated[str, typer.Option(help="auto, masks, alpha, rembg, grabcut or none.")] = "auto",
    up: Annotated[str, typer.Option(help="auto or the input's up axis: +y, +z, ...")] = "auto",
    depth_unit_scale: Annotated[
        float | None, typer.Option(help="World units per step of the depth PNGs, if the camera file has none.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps of a generative model.")] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance strength of a generative model.")] = None,
    multiimage_mode: Annotated[str, typer.Option(help="trellis: stochastic or multidiffusion.")] = "stochastic",
) -> dict[str, Any]:
    """What Options is made of, not checked yet."""
    return {
        "model": model, "refine": refine, "preset": preset, "seed": seed,
        "target_faces": target_faces, "texture_size": texture_size,
        "formats": tuple(name.strip() for name in formats.split(",")),
        "steps": steps, "cfg": cfg, "multiimage_mode": multiimage_mode,
        "views": {"rig": rig, "cameras": cameras, "mask": mask, "up": up, "depth_unit_scale": depth_unit_scale},
    }  # fmt: skip


def options_of(given: dict[str, Any], command: str) -> "Options":
    """The Options that a command line asks for. Raises OptionError naming the first that is wrong."""
    from pydantic import ValidationError

    from viewmesh.options import Options

    try:
        return Options.model_validate(given)
    except ValidationError as error:
        raise OptionError(_sentence(error.errors()[0]), hint=f"See viewmesh {command} --help.") from error


def _sentence(error: Any) -> str:
    """Pydantic's, of the option as it is typed; what else the location holds is where it lies in Options."""
    names = [part for part in error["loc"] if isinstance(part, str)]
    option, said = f"--{names[-1].replace('_', '-')}", error["msg"].removeprefix("Value error, ")
    if said.startswith("Input should "):
        return f"{option} must {said.removeprefix('Input should ')}, not {error['input']!r}."
    return f"{option} {said.removeprefix(f'{names[-1]} ')}."


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the parameters of `wishes` in place of its parameter `options`, which is made of them."""
    asked = inspect.signature(wishes).parameters

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = wishes(**{name: values.pop(name) for name in asked})
        command(**values, options=options_of(given, command.__name__))

    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        parameters += asked.values() if parameter.name == "options" else [parameter]
    by_name = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(by_name)  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {}  # typer would look for the names in them
    return run
