"""params.yaml as frozen dataclasses: checked as a whole, before any work starts.

No field has a default: every value is written in params.yaml, where DVC sees it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from edgeke.entries import Requirement
from edgeke.errors import InputError
from edgeke.learning.orders import ORDERS
from edgeke.networks.architecture import Architecture, ExitSpec
from edgeke.remote import ssh_command
from edgeke.schema import build, check_keys, require

__all__ = [
    "KD",
    "Augmentation",
    "BranchyNet",
    "Calibrate",
    "Data",
    "Distill",
    "Evaluate",
    "Export",
    "Network",
    "Params",
    "Plan",
    "Profile",
    "Recipe",
    "Recipes",
    "Source",
    "Tracking",
    "Training",
    "load",
    "parse",
]


@dataclass(frozen=True)
class Data:
    """Where the user's own images lie."""

    path: str

    def __post_init__(self) -> None:
        require(bool(self.path), "path", "name a folder, for example data/source")


@dataclass(frozen=True)
class KD:
    """Knowledge distillation: loss = (1 - beta) CE + beta T^2 D(student/T, teacher/T).

    `source` says who supervises the BranchyNet's exits; branches distilled alone always learn from
    the teacher. `paper_weights` restores the paper's weights for its Wasserstein distance.
    """

    distance: Literal["kl", "js", "wasserstein", "wasserstein_classes", "dkd", "none"]
    beta: float
    temperature: float
    source: Literal["teacher", "main", "both"]
    paper_weights: bool

    def __post_init__(self) -> None:
        require(0 <= self.beta <= 1, "beta", "use a share between 0 (labels only) and 1")
        require(self.temperature > 0, "temperature", "use a number above 0; 4 is usual")


@dataclass(frozen=True)
class Distill:
    """Which branches are distilled alone."""

    branches: tuple[int, ...]


@dataclass(frozen=True)
class BranchyNet:
    """Where the exits are, in which order they are trained, and their weights when joint.

    `layout` is a name, or a list of `{attach: ..., kind: ...}` for the exits before the main one.
    """

    layout: str | tuple[ExitSpec, ...]
    order: Literal["independent", "synchronous", "asynchronous", "asynchronous_back", "mixed"]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        positive = all(weight >= 0 for weight in self.weights) and sum(self.weights) > 0
        require(positive, "weights", "use one weight of 0 or more per exit, not all 0")


@dataclass(frozen=True)
class Export:
    """How strictly ONNX must agree with PyTorch, and int8 with both."""

    parity_images: int
    parity_tolerance: float
    quantisation_images: int
    int8_tolerance: float

    def __post_init__(self) -> None:
        require(self.parity_images >= 1, "parity_images", "use at least 1")
        require(0 < self.parity_tolerance < 1, "parity_tolerance", "use a small number, 1.0e-4")
        require(self.quantisation_images >= 1, "quantisation_images", "use at least 1")
        require(0 < self.int8_tolerance <= 1, "int8_tolerance", "use a share such as 0.01")


@dataclass(frozen=True)
class Calibrate:
    """The score, what is required, and how the operating points are chosen."""

    score: Literal["best", "max_probability", "margin", "entropy", "learned"]
    proportions: tuple[float, ...]
    cost_step: float
    delta: float
    requirements: tuple[Requirement, ...]

    def __post_init__(self) -> None:
        in_range = all(0 <= share <= 1 for share in self.proportions)
        require(in_range, "proportions", "every share must lie between 0 and 1")
        require(0.01 <= self.cost_step <= 1, "cost_step", "use a share such as 0.05")
        require(0 < self.delta < 1, "delta", "use a risk between 0 and 1, such as 0.1")
        names = [asked.name for asked in self.requirements]
        require(len(set(names)) == len(names), "requirements", "list each requirement once")


@dataclass(frozen=True)
class Evaluate:
    """How and where the device is measured; `threads`: first its own setting, then others."""

    device: str
    python: str
    latency_images: int
    deadline_ms: float | None
    threads: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.device != "local":
            ssh_command(self.device)  # refuses what is no address, before anything is trained
        require(bool(self.python), "python", "name the device's interpreter, such as python3")
        require(self.latency_images >= 1, "latency_images", "use at least 1")
        deadline = self.deadline_ms
        require(deadline is None or deadline > 0, "deadline_ms", "use milliseconds above 0")
        distinct = 0 < len(set(self.threads)) == len(self.threads)
        possible = distinct and all(1 <= number <= 1024 for number in self.threads)
        require(
            possible, "threads", "list numbers of threads from 1, each once; the device's first"
        )


@dataclass(frozen=True)
class Tracking:
    """Whether runs are logged, where in MLflow, and what happens when it is away at start."""

    enabled: bool
    experiment: str
    on_failure: Literal["fail", "warn"]

    def __post_init__(self) -> None:
        require(bool(self.experiment.strip()), "experiment", "name the MLflow experiment")


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
        fits = 8 <= self.image_size <= 1024 and self.image_size % 8 == 0
        require(fits, "image_size", "use a multiple of 8 up to 1024 (three stages halve the side)")
        require(self.channels in (1, 3), "channels", "use 1 (grey) or 3 (colour)")
        for name in ("validation", "calibration", "test"):
            value = getattr(self, name)
            ok = value is None or (value >= 1 if isinstance(value, int) else 0 < value < 1)
            require(ok, name, "use a number of images (whole, at least 1) or a share such as 0.1")


@dataclass(frozen=True)
class Network:
    """A backbone and the channels of its first stage."""

    network: Literal["resnet10", "resnet18", "resnet34"]
    width: int

    def __post_init__(self) -> None:
        require(1 <= self.width <= 1024, "width", "use 1 to 1024 channels; the paper's is 64")


@dataclass(frozen=True)
class Recipe:
    """How one network is trained; the last epoch's weights (or their moving average) are kept."""

    epochs: int
    batch_size: int
    optimiser: Literal["sgd", "adam", "adamw"]
    learning_rate: float
    momentum: float
    weight_decay: float
    decay_norms: bool
    schedule: Literal["one_cycle", "cosine", "step"]
    warmup: float
    label_smoothing: float
    ema: float
    clip: float | None
    patience: int | None

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", "use at least 1")
        require(self.batch_size >= 2, "batch_size", "use at least 2 (batch norm needs two)")
        require(self.learning_rate > 0, "learning_rate", "use a number above 0")
        require(0 < self.momentum < 1, "momentum", "use a number between 0 and 1; 0.9 is usual")
        require(self.weight_decay >= 0, "weight_decay", "use 0 or more; 5.0e-4 is usual")
        require(0 <= self.warmup < 1, "warmup", "use the share of steps spent rising, such as 0.2")
        smooth = 0 <= self.label_smoothing < 1
        require(smooth, "label_smoothing", "use 0 (none) or a share such as 0.1")
        require(0 <= self.ema < 1, "ema", "use 0 (none) or a decay per step such as 0.999")
        require(self.clip is None or self.clip > 0, "clip", "use null (none) or a largest norm")
        patient = self.patience is None or self.patience >= 1
        require(patient, "patience", "use null (train all epochs) or epochs without improvement")


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, drawn per image."""

    crop_padding: int
    flip: bool
    cutout: int
    mixup: float
    cutmix: float
    trivial_augment: bool

    def __post_init__(self) -> None:
        require(self.crop_padding >= 0, "crop_padding", "use 0 (no random crop) or more pixels")
        require(self.cutout >= 0, "cutout", "use 0 (none) or the side of the erased square")
        require(self.mixup >= 0, "mixup", "use 0 (none) or the Beta parameter, such as 0.2")
        require(self.cutmix >= 0, "cutmix", "use 0 (none) or the Beta parameter, such as 1.0")


@dataclass(frozen=True)
class Training:
    """How the machine trains; checkpoints are written every so many epochs."""

    precision: Literal["fp32", "bf16"]
    channels_last: bool
    compile: bool
    checkpoint_every: int

    def __post_init__(self) -> None:
        require(self.checkpoint_every >= 1, "checkpoint_every", "use at least 1 epoch")


@dataclass(frozen=True)
class Plan:
    """Everything the fit loop is told: no section of its own, but put together from several."""

    seed: int
    training: Training
    augmentation: Augmentation
    recipe: Recipe


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
    augmentation: Augmentation
    recipes: Recipes

    def __post_init__(self) -> None:
        fits = self.augmentation.crop_padding < self.data.image_size
        require(fits, "augmentation.crop_padding", "pad by less than the image's side")


@dataclass(frozen=True)
class Params:
    """All of params.yaml, with only the chosen profile."""

    profile_name: str
    seed: int
    data: Data
    kd: KD
    distill: Distill
    branchynet: BranchyNet
    training: Training
    export: Export
    calibrate: Calibrate
    evaluate: Evaluate
    tracking: Tracking
    profile: Profile

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "seed", "use a whole number from 0 to 2147483647")
        student = self.profile.student
        # Classes and channels do not matter here: this checks attach points, kinds and order.
        layout = Architecture.with_layout(self.branchynet.layout, student.network, 8, 1, 2)
        exits, order = len(layout.exits), self.branchynet.order
        branches, starts = self.distill.branches, ORDERS[order](layout.depths).starts
        fits = len(set(branches)) == len(branches) and all(0 <= b < exits for b in branches)
        first = ", ".join(map(str, starts)) or "none"
        require(
            fits and bool(branches) and set(starts) <= set(branches),
            "distill.branches",
            f"the layout has exits 0 to {exits - 1}, each named once, and order {order} starts "
            f"from branch {first}; add -S 'distill.branches=[{','.join(map(str, range(exits)))}]'",
        )
        for key, values in (
            ("branchynet.weights", self.branchynet.weights),
            ("calibrate.proportions", self.calibrate.proportions),
        ):
            example = ",".join(["0.5"] * exits)
            require(
                len(values) == exits,
                key,
                f"the layout has {exits} exits; give as many numbers, e.g. -S '{key}=[{example}]'",
            )
        require(
            self.kd.source == "teacher" or order not in ("asynchronous_back", "independent"),
            "kd.source",
            f"with order {order} the main exit is not there to supervise the others; use "
            "-S kd.source=teacher",
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
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}); replace it") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold sections such as `kd:`, not {content!r}")
    return parse(content, str(path))


def parse(content: Mapping[str, Any], where: str = "params.yaml") -> Params:
    """Build the parameters from the content of a params.yaml.

    Errors: InputError naming key, value and remedy. Every profile is checked, so a typo in one
    that is not chosen is found too.
    """
    sections = [field.name for field in fields(Params) if field.name != "profile_name"]
    check_keys(content, [*sections, "profiles"], "", where)
    values = dict(content)
    for key in ("profile", "profiles"):
        if key not in values:
            raise InputError(f"{where}: key `{key}` is missing; add it")
    name, profiles = values.pop("profile"), values.pop("profiles")
    if not isinstance(profiles, dict) or not profiles:
        raise InputError(f"{where}: `profiles` must hold at least one profile")
    if not isinstance(name, str) or name not in profiles:
        raise InputError(
            f"{where}: profile = {name!r} does not exist; use one of "
            f"{', '.join(map(str, profiles))}"
        )
    built = {
        key: build(Profile, block, f"profiles.{key}", where) for key, block in profiles.items()
    }
    values |= {"profile_name": name, "profile": built[name]}
    params: Params = build(Params, values, "", where)
    return params
