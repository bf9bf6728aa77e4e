"""What is in a bundle: the one file with its metadata, and the segments beside it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from edgeke.device.decode import BITS, FIT, FITS
from edgeke.device.manifest import MANIFEST, Block, parse_blocks, read_manifest
from edgeke.device.partitions import Partition, parse_partitions
from edgeke.device.policy import Policy, SchemaError, parse_policy
from edgeke.device.profile import leads_out
from edgeke.errors import InputError

# Names of the one file; the first that is present is the default.
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
class Metadata:
    """The one file's metadata: policy, class names, image shape `(H, W, C)`, and more.

    `bits`: significant bits of 16-bit pictures. `segments_sha256`: see `segments_hash`; None in
    files of older versions, where `blocks` and `partitions` are empty. `fit`: see
    `decode.fit_picture`. `policy_sha256`: of the policy's text.
    """

    policy: Policy
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    bits: int
    segments_sha256: str | None
    blocks: tuple[Block, ...]
    fit: str = FIT
    policy_sha256: str = ""
    partitions: tuple[Partition, ...] = ()


def find_bundle(path: Path, precision: str | None = None) -> Bundle:
    """The files of a bundle folder, or of a single `.onnx` file (which has no segments).

    In a folder int8 is preferred where it is present. A folder's files may be symbolic links within
    it, but not to elsewhere. Errors: InputError when nothing is there, or not that precision.
    """
    names = {name: key for key, name in PRECISIONS.items()}
    files: dict[str | None, Path] = {}
    try:
        if path.is_file():
            files = {names.get(path.name): path}
        elif path.is_dir():
            files = {key: path / name for name, key in names.items() if (path / name).is_file()}
        else:
            raise InputError(f"{path} is missing; give a bundle folder or its .onnx file")
    except PermissionError as error:
        raise InputError(
            f"{error.filename} may not be read by this user (permission denied); change the "
            "folder's owner or mode"
        ) from None
    if not files:
        raise InputError(
            f"{path} holds no {' or '.join(names)}; copy the whole bundle, or give the .onnx file"
        )
    chosen = precision or next(iter(files))
    if chosen not in files:
        present = ", ".join(key or "an unknown one" for key in files)
        raise InputError(
            f"{path} has no model of precision {chosen!r}, only {present}; choose that, or give a "
            "folder that has it"
        )
    if path.is_dir():
        _stays_within(path, files[chosen])
    segments = path / "segments" / str(chosen)
    return Bundle(files[chosen], chosen, segments if (segments / MANIFEST).is_file() else None)


def read_metadata(session: onnxruntime.InferenceSession, name: str) -> Metadata:
    """The metadata of an open one-file model.

    Errors: InputError for a foreign or damaged file, or one of another version.
    """
    metadata = session.get_modelmeta().custom_metadata_map
    shapes = {t.name: t.shape for t in (*session.get_inputs(), *session.get_outputs())}
    if missing := {"policy", "classes", "image_shape"} - set(metadata):
        raise InputError(
            f"{name} is no one-file model of EdgeKE: its metadata lacks "
            f"{', '.join(sorted(missing))}; give edgeke.onnx or edgeke.int8.onnx of a bundle"
        )
    try:
        policy = parse_policy(metadata["policy"])
        classes = tuple(map(str, json.loads(metadata["classes"])))
        height, width, channels = json.loads(metadata["image_shape"])
        bits = json.loads(metadata.get("bits", str(BITS)))
        fit = json.loads(metadata.get("fit", json.dumps(FIT)))
        blocks = parse_blocks(json.loads(metadata.get("blocks", "[]")))
        partitions = parse_partitions(metadata.get("partitions", "[]"), policy)
        fits = bits in range(8, 17) and fit in FITS
        expected = {
            "image": [1, height, width, channels],
            "thresholds": [len(policy.macs)],
            "votes": [len(policy.macs)],
            "bias": [len(classes)],
            "probabilities": [1, len(classes)],
            "exit": [1],
        }
        if policy.histogram:
            expected["first_score"] = [1]
        if not fits or shapes != expected:
            raise InputError("its metadata does not fit its graph")
    except SchemaError as error:
        raise InputError(f"{name} is of another version: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{name} is damaged: {error}; copy or export it again") from error
    shape = (height, width, channels)
    segments, text = metadata.get("segments_sha256"), metadata["policy"].encode()
    sha256 = hashlib.sha256(text).hexdigest()
    return Metadata(policy, classes, shape, bits, segments, blocks, fit, sha256, partitions)


def describe_pixels(shape: tuple[int, int, int], fit: str = "crop") -> dict[str, Any]:
    """What an image must be, for the metadata: a reader in another language has no other source.

    `fit`: how the pipeline brings pictures to the size (`frames.fit_frame` has the words).
    """
    height, width, channels = shape
    return {
        "type": "uint8",
        "range": [0, 255],
        "layout": "HWC",
        "height": height,
        "width": width,
        "order": "grey" if channels == 1 else "RGB",
        "fit": fit,
        "resampling": "bicubic, averaging where it shrinks (Pillow's BICUBIC)",
        "normalisation": "in the model",
    }


def read_segments(folder: Path, metadata: Metadata, model: Path) -> list[Path]:
    """The segments' files, shallow to deep.

    Errors: InputError when one is missing or elsewhere, or they are not those that `model` was
    composed of.
    """
    bundle = folder.parents[1]
    _stays_within(bundle, folder / MANIFEST)
    manifest = read_manifest(folder)
    files = [_stays_within(bundle, folder / name) for name in manifest.segments]
    same = (
        len(files) == len(metadata.policy.macs)
        and manifest.macs == metadata.policy.macs
        and manifest.classes == metadata.classes
        and manifest.image_shape == metadata.image_shape
        and metadata.segments_sha256 in (None, segments_hash(files))
    )
    if not same:
        raise InputError(
            f"{folder} belongs to another model than {model}, or is damaged; copy both from the "
            "same bundle"
        )
    return files


def _stays_within(folder: Path, file: Path) -> Path:
    """The file. Errors: InputError when it is a link that leads out of the folder."""
    if leads_out(folder, file):
        raise InputError(
            f"{file} leads out of {folder}, and nothing outside of a bundle is read; copy the file "
            "itself into the bundle, or give the .onnx file alone"
        )
    return file


def segments_hash(files: Sequence[Path]) -> str:
    """SHA-256 over the files' own SHA-256, in order. Errors: InputError when one is missing."""
    whole = hashlib.sha256()
    for file in files:
        try:
            whole.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error}); copy the whole bundle") from error
    return whole.hexdigest()
