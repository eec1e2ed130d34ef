"""The import arrows: serve_app → deployments → viewmesh.{nvdiffrec, trellis, export, views} → render → geometry.

Read from the source with ast, so imports inside functions and under TYPE_CHECKING count too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("viewmesh", "deployments", "serve_app")


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, dotted; "from a import b" gives a and a.b, b may be a module."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {file: set(imports(file)) for root in OURS for file in sorted((ROOT / root).rglob("*.py"))}


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def crossing(sources: tuple[str, ...], targets: tuple[str, ...]) -> list[str]:
    """The imports that lead from a module of `sources` into one of `targets`, for the failure's message."""
    return sorted(
        f"{module(file)} -> {name}"
        for file, names in FILES.items()
        if within(module(file), *sources)
        for name in names
        if within(name, *targets)
    )


def test_the_reader_sees_every_kind_of_import(tmp_path):
    source = """
import a.b, c as d
from e import f
if TYPE_CHECKING:
    from g.h import i
def function():
    import j
    importlib.import_module("k.l")
"""
    (tmp_path / "x.py").write_text(source)
    assert set(imports(tmp_path / "x.py")) == {"a.b", "c", "e", "e.f", "g.h", "g.h.i", "j", "k.l"}
    assert len(FILES) > 100
    assert crossing(("viewmesh.nvdiffrec",), ("viewmesh.render",))  # it would find an arrow


# who must not know whom: a package, and what lies above or beside it
MODELS = ("viewmesh.nvdiffrec", "viewmesh.trellis")
SENTENCE = ("viewmesh.reconstruct", "viewmesh.cli", "viewmesh.doctor")
ARROWS = [
    (("viewmesh",), ("deployments", "serve_app")),
    (("deployments",), ("serve_app",)),
    (("viewmesh.geometry",), (*MODELS, "viewmesh.render", "viewmesh.export", "viewmesh.views", "viewmesh.sample",
                              "viewmesh.weights", *SENTENCE)),
    (("viewmesh.render",), (*MODELS, "viewmesh.export", "viewmesh.views", "viewmesh.sample", "viewmesh.weights",
                            *SENTENCE)),
    (("viewmesh.views",), (*MODELS, "viewmesh.render", "viewmesh.export", "viewmesh.sample", *SENTENCE)),
    (("viewmesh.export",), (*MODELS, "viewmesh.sample", *SENTENCE)),
    (("viewmesh.nvdiffrec",), ("viewmesh.trellis", "viewmesh.export", "viewmesh.sample", "viewmesh.weights",
                               *SENTENCE)),
    (("viewmesh.trellis",), ("viewmesh.nvdiffrec", "viewmesh.export", "viewmesh.sample", *SENTENCE)),
    (("viewmesh.weights",), (*MODELS, "viewmesh.render", "viewmesh.export", "viewmesh.views", *SENTENCE)),
    (("viewmesh.sample",), (*MODELS, "viewmesh.export", "viewmesh.views", *SENTENCE)),
    (("viewmesh.errors", "viewmesh.progress", "viewmesh.options"),
     tuple(f"viewmesh.{p}" for p in ("geometry", "render", "views", "export", "nvdiffrec", "trellis", "weights"))),
]  # fmt: skip


@pytest.mark.parametrize(("below", "above"), ARROWS, ids=lambda names: names[0])
def test_arrows_point_one_way(below: tuple[str, ...], above: tuple[str, ...]):
    assert any(within(module(file), *below) for file in FILES)
    assert crossing(below, above) == []


def test_the_library_knows_no_service():
    assert (
        crossing(("viewmesh",), ("ray", "fastapi", "starlette", "dbos", "httpx", "httpcore", "uvicorn", "sqlalchemy"))
        == []
    )
    assert crossing(("deployments",), ("fastapi", "starlette", "dbos", "sqlalchemy")) == []


ONLY_IMPORTERS = {
    "nvdiffrast": ["viewmesh/render/backend_nvdiffrast.py"],
    # three families of kernels, one door each
    "numba": ["viewmesh/geometry/jit.py", "viewmesh/render/kernels_numba.py", "viewmesh/sample/jit.py"],
    "xatlas": ["viewmesh/geometry/xatlas_child.py"],
    "pycolmap": ["viewmesh/views/sfm.py"],
    "dbos": ["serve_app/durable.py"],
    "rembg": ["viewmesh/views/matting.py"],
    "av": ["viewmesh/export/preview.py"],
    "trimesh": ["viewmesh/export/check.py"],
    "fsspec": ["deployments/artifacts.py"],
}


@pytest.mark.parametrize("package", ONLY_IMPORTERS)
def test_each_of_these_has_one_door(package: str):
    importers = [str(file.relative_to(ROOT)) for file, names in FILES.items() if any(within(n, package) for n in names)]
    assert importers == ONLY_IMPORTERS[package]


def test_triton_stays_in_the_kernels_of_trellis():
    importers = [file for file, names in FILES.items() if any(within(n, "triton") for n in names)]
    assert all(file.name.endswith("_triton.py") and file.parent.name == "trellis" for file in importers)
