import os
import shutil
import subprocess
import zipfile

import pytest
from toys import ROOT

from edgeke import bundle
from edgeke.bundle import make_bundle
from edgeke.errors import InputError


@pytest.fixture
def models(tmp_path):
    """A models folder with everything the pipeline leaves there, in a few bytes."""
    folder = tmp_path / "models"
    for name in (
        "edgeke.onnx", "edgeke.int8.onnx", "profile.json",
        "teacher.safetensors", "logits.safetensors", "static/main.onnx", "branches/0.json",
        "segments/segments.json", "segments/fp32/segments.json", "segments/fp32/0.onnx",
        "segments/int8/segments.json", "segments/int8/0.onnx", "segments/int8/profile.json",
        "samples/00.png",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_holds_what_a_device_needs_and_no_more(models, tmp_path):
    archive = make_bundle(models, tmp_path / "out" / "bundle")
    content = files(tmp_path / "out" / "bundle")
    package = {name for name in content if name.startswith("edgeke/")}
    assert content - package == {
        "edgeke.onnx", "edgeke.int8.onnx", "README.md", "LICENSE", "CONTENTS.txt", "samples/00.png",
        "segments/fp32/segments.json", "segments/fp32/0.onnx",
        "segments/int8/segments.json", "segments/int8/0.onnx",
    }  # fmt: skip
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "edgeke" / "device").glob("*.py")}
    assert package == {"edgeke/__init__.py", "edgeke/errors.py", *expected}
    assert len((tmp_path / "out" / "bundle" / "README.md").read_text().splitlines()) == 6
    with zipfile.ZipFile(archive) as packed:
        assert set(packed.namelist()) == {f"bundle/{name}" for name in content}
        assert packed.read("bundle/segments/fp32/0.onnx") == b"segments/fp32/0.onnx"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bundle", "bundle.zip"}


def test_an_older_bundle_is_replaced_and_the_users_files_stay(models, tmp_path):
    """The README sends people there: pictures, and the profile that was measured."""
    folder = tmp_path / "bundle"
    make_bundle(models, folder)
    mine = ("photo.png", "profile.json", "segments/notes.txt")
    for name in mine:
        (folder / name).write_text(name)
    (models / "edgeke.int8.onnx").unlink()
    shutil.rmtree(models / "segments" / "int8")
    (models / "edgeke.onnx").write_text("new")
    archive = make_bundle(models, folder)
    assert (folder / "edgeke.onnx").read_text() == "new"
    assert not (folder / "segments" / "int8").exists()
    content = files(folder)
    assert "edgeke.int8.onnx" not in content
    assert set(mine) < content
    with zipfile.ZipFile(archive) as packed:
        assert {f"bundle/{name}" for name in content - set(mine)} == set(packed.namelist())


def test_nothing_of_the_users_is_overwritten(models, tmp_path):
    before = files(models)
    for folder in (models, ROOT):
        with pytest.raises(InputError, match=r"is there and is no bundle: it has no CONTENTS\.txt"):
            make_bundle(models, folder)
    assert files(models) == before
    folder = tmp_path / "bundle"
    folder.mkdir()
    make_bundle(models, folder)
    (models / "edgeke.big.onnx").write_text("new")
    (folder / "edgeke.big.onnx").write_text("mine")
    with pytest.raises(InputError, match=r"edgeke\.big\.onnx is not the bundle's and in its way"):
        make_bundle(models, folder)
    assert (folder / "edgeke.big.onnx").read_text() == "mine"


def test_a_clock_that_says_1970_is_no_obstacle(models, tmp_path, monkeypatch):
    copy = shutil.copyfile

    def copy_in_1970(source, target, **options):
        copy(source, target, **options)
        os.utime(target, (100, 100))

    monkeypatch.setattr(shutil, "copyfile", copy_in_1970)
    with zipfile.ZipFile(make_bundle(models, tmp_path / "bundle")) as packed:
        assert packed.getinfo("bundle/edgeke.onnx").date_time[0] == 1980


def test_without_a_model_the_remedy_is_named(tmp_path, capsys):
    (tmp_path / "models").mkdir()
    assert bundle.main(["--models", str(tmp_path / "models"), "--out", str(tmp_path / "b")]) == 1
    assert "holds no edgeke*.onnx; build the model first: `dvc repro`" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_failure_leaves_the_old_bundle(models, tmp_path, monkeypatch):
    make_bundle(models, tmp_path / "bundle")
    before = files(tmp_path)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle.zipfile.ZipFile, "write", full)
    with pytest.raises(InputError, match="no space left"):
        make_bundle(models, tmp_path / "bundle")
    assert files(tmp_path) == before


def test_the_script_packs_from_the_root(models, tmp_path):
    command = ["scripts/bundle", "--models", str(models), "--out", str(tmp_path / "packed")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "packed.zip" in done.stdout
    assert (tmp_path / "packed.zip").is_file()


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "make_bundle", interrupt)
    assert bundle.main(["--out", str(tmp_path / "b")]) == 130
    assert capsys.readouterr().err == "stopped\n"
