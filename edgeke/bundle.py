"""Packs what a device needs into one folder and one zip: model, policy, segments, device room.

Run from the repository's root: python -m edgeke.bundle (or `make bundle`).
"""

import argparse
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import edgeke
from edgeke.errors import InputError, report
from edgeke.files import replacing

__all__ = ["copy_device_package", "main", "make_bundle"]

_TITLE = "# EdgeKE bundle"
_README = f"""{_TITLE}

On the device (Python 3.11 or newer): pip install numpy onnxruntime, and pillow for pictures
In this folder: python -m edgeke.device info .  (then: profile, predict, benchmark)
In Python: from edgeke.device.classifier import Classifier; Classifier(".").predict(image)
"""


def make_bundle(models: Path, folder: Path) -> Path:
    """Write the bundle `folder` and `folder.zip` beside it; return the zip.

    Everything is written to a temporary name first. An older bundle is replaced; measured profiles
    stay behind, since they belong to one machine. Errors: InputError when `models` holds no model,
    or `folder` is something else than a bundle.
    """
    networks = sorted(models.glob("edgeke*.onnx"))
    if not networks:
        raise InputError(f"{models} holds no edgeke*.onnx; build the model first: `dvc repro`")
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _fill(temporary, models, networks)
        archive = folder.with_name(f"{folder.name}.zip")
        with (
            replacing(archive) as partial,
            zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file,
        ):
            for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
                file.write(path, Path(folder.name) / path.relative_to(temporary))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return archive


def copy_device_package(folder: Path) -> Path:
    """Copy what a device imports to `folder/edgeke`; returns that path."""
    package, target = Path(edgeke.__file__).parent, folder / "edgeke"
    shutil.copytree(
        package / "device", target / "device", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("__init__.py", "errors.py"):
        shutil.copyfile(package / name, target / name)
    return target


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    readme = folder / "README.md"
    if not readme.is_file() or not readme.read_text().startswith(_TITLE):
        raise InputError(f"{folder} is there and is no bundle; remove it or choose another folder")


def _fill(target: Path, models: Path, networks: Sequence[Path]) -> None:
    package = Path(__file__).parent
    target.mkdir()
    for file in [*networks, *sorted(models.glob("policy*.json"))]:
        shutil.copyfile(file, target / file.name)
    for manifest in sorted((models / "segments").glob("*/segments.json")):
        precision = target / "segments" / manifest.parent.name
        precision.mkdir(parents=True)
        for file in [manifest, *sorted(manifest.parent.glob("*.onnx"))]:
            shutil.copyfile(file, precision / file.name)
    copy_device_package(target)
    licence = package.parent / "LICENSE"
    if licence.is_file():
        shutil.copyfile(licence, target / licence.name)
    (target / "README.md").write_text(_README)


def main(arguments: Sequence[str]) -> int:
    """The command. Returns 0, or 1 with the error in one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m edgeke.bundle", description=main.__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help="default: models")
    parser.add_argument("--out", type=Path, default=Path("bundle"), help="default: bundle")
    asked = parser.parse_args(arguments)
    try:
        archive = make_bundle(asked.models, asked.out)
    except InputError as error:
        return report(error)
    print(f"{asked.out}/ and {archive} ({archive.stat().st_size / 2**20:.1f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
