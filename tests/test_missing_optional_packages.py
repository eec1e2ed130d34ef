"""Every module of the library imports, and says what is missing in one sentence, where the optional packages are not.

Each script runs in a process of its own whose import system does not find the hidden packages.
"""

import json
import subprocess
import sys

import pytest

HIDDEN = ("nvdiffrast", "rembg", "triton", "psycopg", "s3fs", "pycolmap", "xatlas", "av")

HIDE = """
import sys

class Without:
    def __init__(self, finder, hidden):
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.hidden else self.finder.find_spec(name, path, target)

    def find_distributions(self, *given):
        return getattr(self.finder, "find_distributions", lambda *_: ())(*given)

    def invalidate_caches(self):
        pass

hidden = {hidden!r}
sys.meta_path = [Without(finder, hidden) for finder in sys.meta_path]
"""


def run(script: str) -> str:
    """What the script prints."""
    code = HIDE.replace("{hidden!r}", repr(HIDDEN)) + script
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_packages_are_hidden():
    script = """
import importlib.util
assert all(importlib.util.find_spec(name) is None for name in hidden)
assert importlib.util.find_spec("numpy")
try:
    import xatlas
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(script) == "No module named 'xatlas'\n"


def test_every_module_imports():
    script = """
import importlib, pkgutil, viewmesh
failed = {}
names = [m.name for m in pkgutil.walk_packages(viewmesh.__path__, "viewmesh.")]
assert len(names) > 80
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = repr(error)
import json
print(json.dumps(failed))
assert not any(name in sys.modules for name in hidden)
"""
    assert json.loads(run(script)) == {}


USES = {
    "rembg": """
import numpy as np
from viewmesh.views.matting import available, matted
assert not available()
matted([np.zeros((8, 8, 3), np.uint8)])
""",
    "nvdiffrast": """
from viewmesh.render.rasterizer import get_rasterizer
get_rasterizer("cuda", "nvdiffrast")
""",
}
SAYS = {"rembg": "viewmesh[matting]", "nvdiffrast": "nvdiffrast"}


@pytest.mark.parametrize("package", USES)
def test_using_what_is_missing_names_the_remedy(package: str):
    script = f"""
from viewmesh.errors import MissingModel
use = compile({USES[package]!r}, "use", "exec")
try:
    exec(use)
except MissingModel as error:
    print(error)
    print(error.hint)
"""
    sentence, hint = run(script).splitlines()
    assert package in sentence
    assert "pip install" in hint
    assert SAYS[package] in hint


def test_the_cpu_rasterizer_needs_none_of_them():
    script = """
from viewmesh.render.rasterizer import get_rasterizer
print(type(get_rasterizer("cpu")).__name__)
"""
    assert run(script) == "NumbaRasterizer\n"


def test_an_atlas_without_xatlas_is_the_fallback():
    """xatlas runs in a child that may die; a child that cannot import it is the same to the caller."""
    script = """
import torch
from viewmesh.geometry.unwrap import unwrap
from viewmesh.geometry.mesh import Mesh
mesh = Mesh(torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
            torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]))
atlas = unwrap(mesh, 64)
assert atlas.uv_faces.shape == (4, 3) and 0 <= float(atlas.uvs.min()) and float(atlas.uvs.max()) <= 1
print("ok")
"""
    assert run(script) == "ok\n"


def test_doctor_says_what_is_missing_and_the_command_that_gets_it():
    script = """
import json
from viewmesh.doctor import examine
print(json.dumps([vars(f) for f in examine()]))
"""
    found = {f["what"]: f for f in json.loads(run(script))}
    for name in ("nvdiffrast", "rembg", "triton"):
        assert found[name]["state"] == "optional"
        assert "pip install" in found[name]["remedy"]
    for name in ("xatlas", "pycolmap"):
        assert found[name]["state"] == "problem"
        assert found[name]["remedy"] == f"pip install {name}"
    assert found["numba"]["state"] == "ok"
