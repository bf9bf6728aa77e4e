"""params.yaml as frozen dataclasses: checked as a whole, before any work starts.

No field has a default: every value is written in params.yaml, where DVC sees it.
"""

import contextlib
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from edgeke.errors import InputError
from edgeke.networks.architecture import layout_exits

__all__ = [
    "KD",
    "BranchyNet",
    "Calibrate",
    "Data",
    "Distill",
    "Evaluate",
    "Export",
    "Network",
    "Params",
    "Profile",
    "Recipe",
    "Recipes",
    "Source",
    "Tracking",
    "flatten",
    "load",
    "parse",
]


class _OutOfRangeError(ValueError):
    """A field's value is refused; the builder adds the full key."""

    def __init__(self, field: str, remedy: str) -> None:
        super().__init__(remedy)
        self.field = field


def _check(ok: bool, field: str, remedy: str) -> None:
    if not ok:
        raise _OutOfRangeError(field, remedy)


@dataclass(frozen=True)
class Data:
    """Where the user's own images lie."""

    path: str

    def __post_init__(self) -> None:
        _check(bool(self.path), "path", "name a folder, for example data/source")


@dataclass(frozen=True)
class KD:
    """Knowledge distillation: loss = (1 - beta) CE + beta T^2 D(student/T, teacher/T)."""

    distance: Literal["kl", "js", "wasserstein", "none"]
    beta: float
    temperature: float

    def __post_init__(self) -> None:
        _check(0 <= self.beta <= 1, "beta", "use a share between 0 (labels only) and 1")
        _check(self.temperature > 0, "temperature", "use a number above 0; 4 is usual")


@dataclass(frozen=True)
class Distill:
    """Which branches are distilled alone."""

    branches: tuple[int, ...]


@dataclass(frozen=True)
class BranchyNet:
    """Where the exits are, and in which order they are trained."""

    layout: Literal["edgeke"]
    order: Literal["asynchronous", "asynchronous_back"]


@dataclass(frozen=True)
class Export:
    """How strictly ONNX must agree with PyTorch."""

    parity_images: int
    parity_tolerance: float

    def __post_init__(self) -> None:
        _check(self.parity_images >= 1, "parity_images", "use at least 1")
        _check(0 < self.parity_tolerance < 1, "parity_tolerance", "use a small number, 1.0e-4")


@dataclass(frozen=True)
class Calibrate:
    """The score and how the operating points are chosen."""

    score: Literal["max_probability"]
    proportions: tuple[float, ...]
    frontier_points: int

    def __post_init__(self) -> None:
        in_range = all(0 <= share <= 1 for share in self.proportions)
        _check(in_range, "proportions", "every share must lie between 0 and 1")
        _check(self.frontier_points >= 2, "frontier_points", "use at least 2")


@dataclass(frozen=True)
class Evaluate:
    """How the device is measured."""

    threads: int
    latency_images: int

    def __post_init__(self) -> None:
        _check(self.threads >= 1, "threads", "use at least 1")
        _check(self.latency_images >= 1, "latency_images", "use at least 1")


@dataclass(frozen=True)
class Tracking:
    """Whether runs are logged to MLflow, and under which experiment."""

    enabled: bool
    experiment: str

    def __post_init__(self) -> None:
        _check(bool(self.experiment.strip()), "experiment", "name the MLflow experiment")


@dataclass(frozen=True)
class Source:
    """A labelled image set and its splits.

    `validation`, `calibration` and `test` are a number of images (int) or a share of all images
    (float below 1); `test: null` keeps the source's own test split.
    """

    source: Literal["digits", "cifar10", "cifar100", "image_folder"]
    image_size: int
    channels: int
    fit: Literal["exact", "resize"]
    validation: int | float
    calibration: int | float
    test: int | float | None

    def __post_init__(self) -> None:
        _check(8 <= self.image_size <= 1024, "image_size", "use a side of 8 to 1024 pixels")
        _check(self.channels in (1, 3), "channels", "use 1 (grey) or 3 (colour)")
        for name in ("validation", "calibration", "test"):
            value = getattr(self, name)
            ok = value is None or (value >= 1 if isinstance(value, int) else 0 < value < 1)
            _check(ok, name, "use a number of images (whole, at least 1) or a share such as 0.1")


@dataclass(frozen=True)
class Network:
    """A backbone and the channels of its first stage."""

    network: Literal["resnet10", "resnet18", "resnet34"]
    width: int

    def __post_init__(self) -> None:
        _check(1 <= self.width <= 1024, "width", "use 1 to 1024 channels; the paper's is 64")


@dataclass(frozen=True)
class Recipe:
    """How one network is trained: SGD with Nesterov momentum under a one-cycle schedule."""

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    warmup: float
    crop_padding: int
    flip: bool

    def __post_init__(self) -> None:
        _check(self.epochs >= 1, "epochs", "use at least 1")
        _check(self.batch_size >= 2, "batch_size", "use at least 2 (batch norm needs two)")
        _check(self.learning_rate > 0, "learning_rate", "use a number above 0")
        _check(0 < self.momentum < 1, "momentum", "use a number between 0 and 1; 0.9 is usual")
        _check(self.weight_decay >= 0, "weight_decay", "use 0 or more; 5.0e-4 is usual")
        _check(0 < self.warmup < 1, "warmup", "use the share of steps spent rising, such as 0.2")
        _check(self.crop_padding >= 0, "crop_padding", "use 0 (no random crop) or more pixels")


@dataclass(frozen=True)
class Recipes:
    """One recipe per training stage."""

    train_teacher: Recipe
    distill: Recipe
    train_branchynet: Recipe


@dataclass(frozen=True)
class Profile:
    """The data, the networks and their recipes."""

    data: Source
    teacher: Network
    student: Network
    recipes: Recipes


@dataclass(frozen=True)
class Params:
    """All of params.yaml, with only the chosen profile."""

    profile_name: str
    seed: int
    data: Data
    kd: KD
    distill: Distill
    branchynet: BranchyNet
    export: Export
    calibrate: Calibrate
    evaluate: Evaluate
    tracking: Tracking
    profile: Profile

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**31, "seed", "use a whole number from 0 to 2147483647")
        exits = len(layout_exits(self.branchynet.layout, self.profile.student.network))
        branches, order = self.distill.branches, self.branchynet.order
        fits = len(set(branches)) == len(branches) and all(0 <= b < exits for b in branches)
        full = ",".join(str(e) for e in range(exits))
        _check(
            fits and bool(branches),
            "distill.branches",
            f"layout {self.branchynet.layout} has exits 0 to {exits - 1}, each named once; add "
            f"-S 'distill.branches=[{full}]'",
        )
        start = 0 if order == "asynchronous_back" else exits - 1
        _check(
            start in branches,
            "distill.branches",
            f"order {order} starts from branch {start}, which must be distilled; add "
            f"-S 'distill.branches=[{full}]'",
        )
        _check(
            len(self.calibrate.proportions) == exits,
            "calibrate.proportions",
            f"layout {self.branchynet.layout} has {exits} exits; give {exits} shares",
        )


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml.

    Errors: InputError naming key, value and remedy.
    """
    import yaml  # imported here so that a bare training machine needs no PyYAML

    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing; run from the repository's root, where params.yaml lies"
        ) from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold sections such as `kd:`, not {content!r}")
    return parse(content, str(path))


def parse(content: Mapping[str, Any], where: str = "params.yaml") -> Params:
    """Build the parameters from the content of a params.yaml.

    Errors: InputError naming key, value and remedy. Every profile is checked, so a typo in one
    that is not chosen is found too.
    """
    sections = [field.name for field in fields(Params) if field.name != "profile_name"]
    _check_keys(content, [*sections, "profiles"], "", where)
    values = dict(content)
    for key in ("profile", "profiles"):
        if key not in values:
            raise InputError(f"{where}: key `{key}` is missing; add it")
    name, profiles = values.pop("profile"), values.pop("profiles")
    if not isinstance(profiles, dict) or not profiles:
        raise InputError(f"{where}: `profiles` must hold at least one profile")
    if name not in profiles:
        raise InputError(
            f"{where}: profile = {name!r} does not exist; use one of "
            f"{', '.join(map(str, profiles))}"
        )
    built = {
        key: _build(Profile, block, f"profiles.{key}", where) for key, block in profiles.items()
    }
    values |= {"profile_name": name, "profile": built[name]}
    params: Params = _build(Params, values, "", where)
    return params


def flatten(params: Params) -> dict[str, str | int | float | bool]:
    """One flat dictionary, as MLflow shows parameters: `kd.beta`, `student.width`, ..."""
    flat: dict[str, str | int | float | bool] = {}

    def add(value: Any, key: str) -> None:
        if hasattr(value, "__dataclass_fields__"):
            for field in fields(value):
                name = "" if field.name == "profile" else field.name
                add(getattr(value, field.name), f"{key}.{name}".strip("."))
        elif value is None or isinstance(value, tuple):
            flat[key] = str(list(value)) if value is not None else "null"
        else:
            flat[key] = value

    add(params, "")
    flat["profile"] = flat.pop("profile_name")
    return flat


def _build(kind: Any, value: Any, key: str, where: str) -> Any:
    """Turn plain YAML into dataclass `kind`, or refuse it by its full key."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {key} = {value!r} must be a section with keys of its own")
    hints = typing.get_type_hints(kind)
    _check_keys(value, hints, key, where)
    arguments = {}
    for name, hint in hints.items():
        full = _join(key, name)
        if name not in value:
            raise InputError(f"{where}: key `{full}` is missing; add it")
        if hasattr(hint, "__dataclass_fields__") and not isinstance(value[name], hint):
            arguments[name] = _build(hint, value[name], full, where)
        else:
            arguments[name] = _convert(hint, value[name], full, where)
    try:
        return kind(**arguments)
    except _OutOfRangeError as error:
        shown: Any = arguments
        for part in error.field.split("."):
            shown = shown[part] if isinstance(shown, dict) else getattr(shown, part)
        shown = list(shown) if isinstance(shown, tuple) else shown
        full = _join(key, error.field)
        raise InputError(f"{where}: {full} = {shown!r} is out of range; {error}") from None


def _check_keys(value: Mapping[str, Any], known: Iterable[str], key: str, where: str) -> None:
    for name in value:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            meant = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"
            raise InputError(
                f"{where}: unknown key `{_join(key, name)}` = {value[name]!r}; {meant}"
            )


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _convert(hint: Any, value: Any, key: str, where: str) -> Any:
    """Check one value against its type hint; integers serve as floats."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in options and isinstance(value, str):
            return value
        raise InputError(f"{where}: {key} = {value!r} is unknown; use one of {', '.join(options)}")
    if origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(options[0], item, key, where) for item in value)
        raise InputError(f"{where}: {key} = {value!r} must be a list, such as [0, 1]")
    accepted = options if origin is types.UnionType else (hint,)
    if float in accepted and isinstance(value, str):
        # PyYAML reads 1e-4 as text; DVC, which follows YAML 1.2, reads a number.
        with contextlib.suppress(ValueError):
            value = float(value)
    if accepted == (float,) and type(value) is int:
        return float(value)
    right_type = isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
    if right_type and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    names = " or ".join("null" if a is types.NoneType else a.__name__ for a in accepted)
    raise InputError(f"{where}: {key} = {value!r} has the wrong type; give one {names}")
