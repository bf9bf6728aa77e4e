"""What is in a bundle: the one file, what it carries, and the segments beside it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from edgeke.device.decode import BITS
from edgeke.device.manifest import MANIFEST, read_manifest
from edgeke.device.policy import Policy, parse_policy
from edgeke.errors import InputError

__all__ = [
    "PRECISIONS",
    "Bundle",
    "Carried",
    "find_bundle",
    "read_carried",
    "read_segments",
    "segments_hash",
]

# By name of the one file; what stands first is taken where nothing is asked for.
PRECISIONS = {"int8": "edgeke.int8.onnx", "fp32": "edgeke.onnx"}


@dataclass(frozen=True)
class Bundle:
    """Where a model's files are; `segments` is None where there is no folder of them.

    `precision` is None for a single file of a name of its own.
    """

    model: Path
    precision: str | None
    segments: Path | None


@dataclass(frozen=True)
class Carried:
    """The one file's metadata: policy, class names, image shape `(H, W, C)`, bits, segments.

    `bits`: significant bits of 16-bit pictures. `segments_sha256`: see `segments_hash`; None in
    files of older versions.
    """

    policy: Policy
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    bits: int
    segments_sha256: str | None


def find_bundle(path: Path, precision: str | None = None) -> Bundle:
    """The files of a bundle folder, or of a single `.onnx` file (which has no segments).

    In a folder int8 is preferred where it is present. Errors: InputError when nothing is there,
    or not the precision asked for.
    """
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    if path.is_file():
        of_name = {name: key for key, name in PRECISIONS.items()}.get(path.name)
        if precision not in (None, of_name):
            raise InputError(
                f"{path} is one file, of precision {of_name or 'unknown'}; to choose "
                f"{precision!r} give the folder it lies in"
            )
        return Bundle(path, of_name, None)
    if not path.is_dir():
        raise InputError(f"{path} is missing; give a bundle folder or its .onnx file")
    present = [key for key, name in PRECISIONS.items() if (path / name).is_file()]
    if not present:
        raise InputError(
            f"{path} holds no {' or '.join(PRECISIONS.values())}; copy the whole bundle, or give "
            "the .onnx file itself"
        )
    if precision is not None and precision not in present:
        raise InputError(
            f"{path} holds no {PRECISIONS[precision]}, only {', '.join(present)}; copy the file or "
            f"ask for precision={present[0]!r}"
        )
    chosen = precision or present[0]
    segments = path / "segments" / chosen
    found = (segments / MANIFEST).is_file()
    return Bundle(path / PRECISIONS[chosen], chosen, segments if found else None)


def read_carried(session: onnxruntime.InferenceSession, name: str) -> Carried:
    """What an open one-file model carries. Errors: InputError for a foreign or damaged file."""
    metadata = session.get_modelmeta().custom_metadata_map
    inputs = {tensor.name: tensor.shape for tensor in session.get_inputs()}
    missing = {"policy", "classes", "image_shape"} - set(metadata)
    if missing or set(inputs) != {"image", "thresholds", "votes"}:
        raise InputError(
            f"{name} is an ONNX model, but not one that EdgeKE composed: it lacks "
            f"{', '.join(sorted(missing)) or 'the inputs image, thresholds and votes'}; give "
            "edgeke.onnx or edgeke.int8.onnx"
        )
    try:
        policy = parse_policy(metadata["policy"])
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    classes, shape = _loaded(metadata["classes"]), _loaded(metadata["image_shape"])
    bits = _loaded(metadata.get("bits", str(BITS)))
    outputs = {tensor.name: tensor.shape for tensor in session.get_outputs()}
    sound = (
        isinstance(classes, list)
        and isinstance(bits, int)
        and 8 <= bits <= 16
        and isinstance(shape, list)
        and len(shape) == 3
        and inputs["image"] == [1, *shape]
        and inputs["thresholds"] == [len(policy.macs)]
        and outputs.get("probabilities") == [1, len(classes)]
    )
    if not sound:
        raise InputError(
            f"{name} contradicts itself: its metadata does not fit its graph; export it again"
        )
    height, width, channels = shape
    return Carried(
        policy,
        tuple(map(str, classes)),
        (height, width, channels),
        bits,
        metadata.get("segments_sha256"),
    )


def read_segments(folder: Path, carried: Carried, model: Path) -> list[Path]:
    """The segments' files, shallow to deep.

    Errors: InputError when one is missing, or they are not those that `model` was composed of.
    """
    manifest = read_manifest(folder)
    files = [folder / name for name in manifest.segments]
    same = (
        len(files) == len(carried.policy.macs)
        and manifest.macs == carried.policy.macs
        and manifest.classes == carried.classes
        and manifest.image_shape == carried.image_shape
        and carried.segments_sha256 in (None, segments_hash(files))
    )
    if not same:
        raise InputError(
            f"{folder} belongs to another model than {model}, or is damaged; copy both from the "
            "same bundle"
        )
    return files


def segments_hash(files: Sequence[Path]) -> str:
    """SHA-256 over the files' own SHA-256, in order. Errors: InputError when one is missing."""
    whole = hashlib.sha256()
    for file in files:
        try:
            whole.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error}); copy the whole bundle") from error
    return whole.hexdigest()


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
