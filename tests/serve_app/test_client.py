"""`viewmesh submit` means what `viewmesh reconstruct` means: the same options, the same files of a folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer.main
from PIL import Image

from deployments.artifacts import Ref
from serve_app.client import files_of
from serve_app.command import app
from serve_app.uploads import File, named
from viewmesh.options import Options, ViewRules
from viewmesh.views.archive import unpack
from viewmesh.views.limits import Limits
from viewmesh.views.load import Plan, plan_views


def test_submit_takes_the_options_of_reconstruct():
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    reconstruct, submit = ({p.name: p for p in commands[name].params} for name in ("reconstruct", "submit"))
    here_only = {"weights", "device", "resume", "as_json"}
    assert set(reconstruct) - here_only == set(submit) - {"url", "key"}
    for name in set(reconstruct) - here_only:
        assert getattr(submit[name], "help", "") == getattr(reconstruct[name], "help", "")
        assert submit[name].default == reconstruct[name].default
    assert {*Options.model_fields, *ViewRules.model_fields} - {"views"} <= set(submit)


def pictures(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16), i, np.uint8)).save(folder / name)


def cameras(file: Path, *frames: dict[str, str]) -> None:
    posed = [{"transform_matrix": np.eye(4).tolist(), **frame} for frame in frames]
    file.write_text(json.dumps({"fl_x": 20, "frames": posed}))


def nerf_synthetic(folder: Path) -> None:
    pictures(folder, *(f"{split}/r_{i}.png" for split in ("train", "test") for i in range(3)))
    cameras(folder / "transforms_train.json", *({"file_path": f"./train/r_{i}"} for i in range(3)))
    cameras(folder / "transforms_test.json", *({"file_path": f"./test/r_{i}"} for i in range(3)))


def nerfstudio(folder: Path) -> None:
    names = [f"frame {i:05d}.png" for i in range(3)]
    pictures(folder, *(f"{kind}/{n}" for kind in ("images", "images_2", "cut") for n in names))
    listed = ({"file_path": f"images/{n}", "mask_path": f"cut/{m}"} for n, m in zip(names, names[::-1], strict=True))
    cameras(folder / "transforms.json", *listed)


def two_camera_files(folder: Path) -> None:
    nerf_synthetic(folder)
    pictures(folder, "views/a.png")
    cameras(folder / "transforms.json", {"file_path": "views/a.png"})


def photos(folder: Path) -> None:
    names = ("left.png", "back.png", "front.png")
    pictures(folder, *(f"{kind}/{n}" for kind in ("images", "masks") for n in names), "notes/plan.png")


def many_photos(folder: Path) -> None:
    pictures(folder, *(f"views/{i}.png" for i in range(70)))


def plan_of(folder: Path) -> Plan:
    return plan_views(folder, ViewRules(), Limits(views=1000))


def pairs(folder: Path) -> list[tuple[bytes, ...]]:
    """What plan_of makes of a folder, by contents: each view, its mask."""
    plan = plan_of(folder)
    return [
        tuple((plan.root / name).read_bytes() for name in names)
        for names in zip(plan.views, *([plan.masks] if plan.masks else []), strict=True)
    ]


@pytest.mark.parametrize("capture", [nerf_synthetic, nerfstudio, two_camera_files, photos, many_photos])
def test_what_arrives_is_what_lies_in_the_folder(tmp_path, capture):
    source, arrived = tmp_path / "source", tmp_path / "arrived"
    source.mkdir()
    arrived.mkdir()
    capture(source)
    sent = files_of(source, tmp_path)
    if [field for field, _ in sent] == ["archive"]:
        unpack(sent[0][1], arrived, Limits())
    else:
        for name, ref in named([File(f, p.name, Ref(str(p), "", 0)) for f, p in sent]).items():
            (arrived / name).parent.mkdir(exist_ok=True)
            shutil.copy(ref.key, arrived / name)
    assert pairs(arrived) == pairs(source)
    assert plan_of(arrived).camera_source == plan_of(source).camera_source
    unused = {p.name for p in arrived.rglob("*.*")} & {"transforms_test.json", "plan.png"}
    assert not unused
    assert not (arrived / "images_2").exists()


def test_an_archive_of_equal_files_is_equal(tmp_path):
    archives = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        nerf_synthetic(tmp_path / name)
        ((_, archive),) = files_of(tmp_path / name, tmp_path / name)
        archives.append(archive.read_bytes())
    assert archives[0] == archives[1]  # so that a repeated submission is known to be the same one
