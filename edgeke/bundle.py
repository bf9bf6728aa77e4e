"""Packs what a device needs into one folder and one zip: models, segments, `edgeke.device`.

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

# The list of the bundle's own files: whatever else is in the folder belongs to the user.
_CONTENTS = "CONTENTS.txt"
_README = """# EdgeKE bundle

On the device (Python 3.11 or newer): pip install numpy onnxruntime, and pillow for pictures
Pixels: uint8, height x width x channels, 0 to 255, RGB (for OpenCV's: Classifier(".", order="bgr"))
In this folder: python -m edgeke.device info .  (then: profile, predict, benchmark)
In Python: from edgeke.device.classifier import Classifier; Classifier(".").predict(image)
"""


def make_bundle(models: Path, folder: Path) -> Path:
    """Write the bundle `folder` and `folder.zip` beside it; return the zip.

    Everything is written to a temporary name first. The files of an older bundle are replaced;
    others in the folder, such as pictures and a measured profile.json, stay, and are not in the
    zip. Errors: InputError, with nothing changed, when `models` holds no model or `folder` is no
    bundle.
    """
    networks = sorted(models.glob("edgeke*.onnx"))
    if not networks:
        raise InputError(f"{models} holds no edgeke*.onnx; build the model first: `dvc repro`")
    old = _own_files(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _fill(temporary, models, networks)
        new = sorted(p.relative_to(temporary) for p in temporary.rglob("*") if p.is_file())
        (temporary / _CONTENTS).write_text("".join(f"{path.as_posix()}\n" for path in new))
        new.append(Path(_CONTENTS))
        for path in new:
            if path not in old and (folder / path).exists():
                raise InputError(f"{folder / path} is not the bundle's and in its way; move it")
        archive = folder.with_name(f"{folder.name}.zip")
        with (
            replacing(archive) as partial,
            # A clock without battery says 1970; zip knows no time before 1980.
            zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as file,
        ):
            for path in new:
                file.write(temporary / path, Path(folder.name) / path)
        _replace(folder, temporary, old, new)
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


def _own_files(folder: Path) -> set[Path]:
    """The relative paths of an older bundle's files; none where there is no folder.

    Errors: InputError when the folder is something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return set()
    try:
        lines = (folder / _CONTENTS).read_text().splitlines()
    except (OSError, ValueError):
        raise InputError(
            f"{folder} is there and is no bundle: it has no {_CONTENTS}; remove it or choose "
            "another folder"
        ) from None
    paths = {Path(_CONTENTS), *map(Path, lines)}
    return {path for path in paths if not path.is_absolute() and ".." not in path.parts}


def _replace(folder: Path, source: Path, old: set[Path], new: Sequence[Path]) -> None:
    """Move the new files from `source`, and remove those of the old that are no more."""
    for path in new:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).replace(folder / path)
    for path in old - set(new):
        (folder / path).unlink(missing_ok=True)
        for parent in list(path.parents)[:-1]:
            if (folder / parent).is_dir() and not any((folder / parent).iterdir()):
                (folder / parent).rmdir()


def _fill(target: Path, models: Path, networks: Sequence[Path]) -> None:
    target.mkdir()
    for file in networks:
        shutil.copyfile(file, target / file.name)
    for manifest in sorted((models / "segments").glob("*/segments.json")):
        precision = target / "segments" / manifest.parent.name
        precision.mkdir(parents=True)
        for file in [manifest, *sorted(manifest.parent.glob("*.onnx"))]:
            shutil.copyfile(file, precision / file.name)
    for picture in sorted((models / "samples").glob("*.png")):
        (target / "samples").mkdir(exist_ok=True)
        shutil.copyfile(picture, target / "samples" / picture.name)
    copy_device_package(target)
    licence = Path(__file__).parents[1] / "LICENSE"
    if licence.is_file():
        shutil.copyfile(licence, target / licence.name)
    (target / "README.md").write_text(_README)


def main(arguments: Sequence[str]) -> int:
    """The command. Returns 0, or 1 with the error in one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m edgeke.bundle", description=main.__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help="default: models")
    parser.add_argument("--out", type=Path, default=Path("bundle"), help="default: bundle")
    options = parser.parse_args(arguments)
    try:
        archive = make_bundle(options.models, options.out)
    except InputError as error:
        return report(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(f"{options.out}/ and {archive} ({archive.stat().st_size / 2**20:.1f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
