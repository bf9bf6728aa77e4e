"""params.yaml as frozen pydantic dataclasses, checked as a whole before any work starts.

What a value means, and why it is as it is, stands in params.yaml. Only fields of a requirement and
of a network have defaults: every other value is in params.yaml, where DVC sees it.
"""

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from ruamel.yaml import YAML  # reads YAML 1.2, as DVC does: `010` is ten, a repeated key an error

from edgeke.errors import InputError
from edgeke.learning.orders import ORDERS, with_codec
from edgeke.networks.architecture import (
    Backbone,
    ExitSpec,
    ImageSize,
    check_layout,
    exit_count,
    resolve_layout,
    sides,
)
from edgeke.remote import ssh_command

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)

# Strict: `true` is no number and 1.5 no whole number, but 4 serves where 4.0 is meant.
Switch = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]  # both ends included
Part = Annotated[Number, Field(gt=0, lt=1)]  # neither
Count = Annotated[Whole, Field(ge=1, le=1_000_000)]
Pixels = Annotated[Whole, Field(ge=0, le=1024)]
Threads = Annotated[Whole, Field(ge=1, le=1024)]
Text = Annotated[str, Field(min_length=1)]


def _use(ok: bool, remedy: str) -> None:
    """Refuse what is being validated; `parse` adds key and value."""
    if not ok:
        raise ValueError(f"use {remedy}")


def _check(accepts: Callable[[Any], bool], remedy: str) -> AfterValidator:
    """A field's own check, where pydantic has none."""

    def check(value: Any) -> Any:
        _use(accepts(value), remedy)
        return value

    return AfterValidator(check)


def _is_pattern(text: str) -> bool:
    try:
        return bool(text) and bool(re.compile(text))
    except re.error:
        return False


_ONCE = _check(lambda values: len({str(v) for v in values}) == len(values), "each entry once")


@dataclass(frozen=True, config=_CONFIG)
class Group:
    """How the file names of the user's own images tell which belong together."""

    folder: Annotated[Whole, Field(ge=1, le=20)] | None = None
    pattern: Annotated[str, _check(_is_pattern, "a regular expression of Python")] | None = None

    def __post_init__(self) -> None:
        one = (self.folder is None) != (self.pattern is None)
        _use(one, "one of {folder: 1} and {pattern: '(part[0-9]+)_'}")


@dataclass(frozen=True, config=_CONFIG)
class Data:
    """The user's own images, read by the sources `image_folder` and `csv`."""

    path: Text
    bits: Annotated[Whole, Field(ge=8, le=16)]
    group: Group | None
    max_megapixels: Annotated[Number, Field(gt=0, le=10_000)]


@dataclass(frozen=True, config=_CONFIG)
class KD:
    """Knowledge distillation. Branches distilled alone learn from the teacher whatever `source`."""

    distance: Literal["kl", "js", "wasserstein", "wasserstein_classes", "dkd", "none"]
    beta: Share
    temperature: Annotated[Number, Field(gt=0, le=1000)]
    source: Literal["teacher", "main", "both"]
    paper_weights: Switch


CodecName = Annotated[str, Field(pattern=r"^(f32|f16|q8|q6|q4|q2)(_r[1-9][0-9]?)?$")]


@dataclass(frozen=True, config=_CONFIG)
class CodecInLoop:
    """What is behind exit `after` learns from features as `codec` lets them through."""

    after: Annotated[Whole, Field(ge=0, le=1000)]
    codec: CodecName

    def __post_init__(self) -> None:
        _use(self.codec != "f32", "a codec that changes something, such as q4")


@dataclass(frozen=True, config=_CONFIG)
class BranchyNet:
    """Where the exits are, and how they are trained."""

    layout: str | tuple[Part | ExitSpec, ...]
    order: Literal["independent", "synchronous", "asynchronous", "asynchronous_back", "mixed"]
    main_weight: Share
    detach: Switch
    codec: CodecInLoop | None = None

    def __post_init__(self) -> None:
        check_layout(self.layout)

    def weights(self, exits: int) -> tuple[float, ...]:
        """The weights of the exits' losses, `[E]`: the early exits share the rest evenly."""
        early = exits - 1
        return (*[(1 - self.main_weight) / early] * early, self.main_weight)


@dataclass(frozen=True, config=_CONFIG)
class Prune:
    """Down to which share of the MACs, and how much validation accuracy that may cost."""

    macs: Part
    max_loss: Annotated[Number, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=_CONFIG)
class Student:
    """What is done to the trained student of any profile."""

    prune: Prune | None


@dataclass(frozen=True, config=_CONFIG)
class Optimisation:
    """How weights move in all three training stages."""

    optimiser: Literal["sgd", "adam", "adamw"]
    momentum: Part
    nesterov: Switch
    weight_decay: Annotated[Number, Field(ge=0, le=10)]
    decay_norms: Switch
    schedule: Literal["one_cycle", "cosine", "step"]
    milestones: tuple[Annotated[Number, Field(gt=0, le=1_000_000)], ...]
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)]
    class_weights: Literal["none", "balanced"]
    sampling: Literal["uniform", "balanced"]
    ema: Annotated[Number, Field(ge=0, lt=1)]
    clip: Positive | None
    patience: Count | None
    trunk_rate: Annotated[Number, Field(gt=0, le=1)]
    keep_statistics: Switch


@dataclass(frozen=True, config=_CONFIG)
class CropAndFlip:
    """The part of the augmentation that a profile chooses for its images."""

    crop_padding: Pixels
    flip: Switch


@dataclass(frozen=True, config=_CONFIG)
class Mixing:
    """The part of the augmentation that all profiles share; 0 and false are off."""

    cutout: Pixels
    mixup: Annotated[Number, Field(ge=0, le=100)]
    cutmix: Annotated[Number, Field(ge=0, le=100)]
    trivial_augment: Switch
    copies: Annotated[Whole, Field(ge=1, le=100)]


@dataclass(frozen=True, config=_CONFIG)
class Augmentation(Mixing, CropAndFlip):
    """What is done to training images, drawn per image."""


@dataclass(frozen=True, config=_CONFIG)
class Training:
    """How the machine trains; checkpoints are written every so many epochs."""

    precision: Literal["fp32", "bf16"]
    channels_last: Switch
    compile: Switch
    checkpoint_every: Count


@dataclass(frozen=True, config=_CONFIG)
class Export:
    """How strictly ONNX must agree with PyTorch, and int8 with both."""

    parity_images: Count
    parity_tolerance: Part
    quantisation_images: Count
    int8_tolerance: Annotated[Number, Field(gt=0, le=1)]
    weight_bits: Literal[7, 8]
    exits: Literal["useful", "all"] = "useful"


@dataclass(frozen=True, config=_CONFIG)
class ClassShare:
    """A share of the images of a class: `{class: crack, share: 0.99}`."""

    class_name: Annotated[Text, Field(alias="class")]
    share: Part


_KINDS = (
    "max_cost",
    "min_accuracy",
    "max_degradation",
    "max_miss",
    "min_recall",
    "max_sure_error",
)


@dataclass(frozen=True, config=_CONFIG)
class Requirement:
    """Exactly one of a greatest mean cost, a least accuracy, a greatest degradation, and others.

    `max_cost` is a share of the plain main network's MACs; `max_degradation` is the share of images
    that the best exit has right and the early answer wrong, `max_miss` the same among those of a
    class; `min_recall` is the share of a class that is answered as that class, `max_sure_error` the
    share answered wrong among the images that some exit is sure of. `delta` is the risk that the
    promise fails over the draw of the calibration split (left out: `calibrate.delta`).
    """

    max_cost: Positive | None = None
    min_accuracy: Part | None = None
    max_degradation: Part | None = None
    delta: Part | None = None
    max_miss: ClassShare | None = None
    min_recall: ClassShare | None = None
    max_sure_error: Part | None = None

    def __post_init__(self) -> None:
        bounds = [getattr(self, kind) for kind in _KINDS]
        words = f"one of {', '.join(_KINDS[:-1])} and {_KINDS[-1]}"
        _use(bounds.count(None) == len(_KINDS) - 1, words)

    @property
    def kind(self) -> str:
        """Its key: `max_cost`, `min_accuracy`, ..."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @property
    def class_name(self) -> str | None:
        """The class that it is about; None for those about all images."""
        value = getattr(self, self.kind)
        return value.class_name if isinstance(value, ClassShare) else None

    @property
    def bound(self) -> float:
        """The required number."""
        value = getattr(self, self.kind)
        return float(value.share if isinstance(value, ClassShare) else value)

    @property
    def name(self) -> str:
        """How metrics call it: `max_degradation_0.03`, `max_degradation_0.03_delta_0.05`."""
        risk = "" if self.delta is None else f"_delta_{self.delta:g}"
        # Metrics in MLflow take no other characters.
        part = "" if self.class_name is None else "_" + re.sub(r"[^\w.-]", "_", self.class_name)
        return f"{self.kind}{part}_{self.bound:g}{risk}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, config=_CONFIG)
class Proportions:
    """The share of images that leaves at each exit, `[E]`: of those that reach it, or of all."""

    of_reaching: tuple[Share, ...] | None = None
    of_all: tuple[Share, ...] | None = None

    def __post_init__(self) -> None:
        one = (self.of_reaching is None) != (self.of_all is None)
        _use(one, "one share, or {of_reaching: [...]}, or {of_all: [...]}")
        _use(sum(self.of_all or ()) < 1 + 1e-9, "shares of all images that sum to at most 1")


@dataclass(frozen=True, config=_CONFIG)
class PartitionSettings:
    """After which exit features may go to a server, and through which codecs."""

    after: Annotated[Whole, Field(ge=0, le=1000)]
    codecs: Annotated[tuple[CodecName, ...], Field(min_length=1), _ONCE]

    def __str__(self) -> str:
        return str(self.after)


@dataclass(frozen=True, config=_CONFIG)
class Calibrate:
    """What turns logits into answers and scores, the operating points, and what is required."""

    score: Literal["best", "max_probability", "margin", "entropy", "learned"]
    proportions: Share | Proportions
    points: Annotated[Whole, Field(ge=10, le=200)]
    temperatures: Literal["fitted", "none"]
    votes: Literal["fitted"] | tuple[Share, ...]
    delta: Part
    requirements: Annotated[tuple[Requirement, ...], _ONCE]
    partitions: Annotated[tuple[PartitionSettings, ...], _ONCE]

    def classes_of(self, kind: str) -> tuple[str, ...]:
        """The classes that requirements of a kind are about, each once."""
        every = [r.class_name for r in self.requirements if r.kind == kind]
        return tuple(dict.fromkeys(name for name in every if name is not None))

    def shares(self, exits: int) -> tuple[float, ...]:
        """The share of the images reaching each exit that leaves there, `[E]`.

        A single number is that of every early exit; the main exit then answers all that reach it.
        """
        if not isinstance(self.proportions, Proportions):
            return (*[self.proportions] * (exits - 1), 1.0)
        if self.proportions.of_reaching is not None:
            return self.proportions.of_reaching
        shares, reaching = [], 1.0
        for share in self.proportions.of_all or ():
            shares.append(min(1.0, share / reaching) if reaching > 1e-9 else 0.0)
            reaching -= share
        return tuple(shares)


@dataclass(frozen=True, config=_CONFIG)
class Evaluate:
    """How and where the device is measured; the first of `threads` is the device itself."""

    # ssh_command refuses what is no address.
    device: Annotated[str, _check(lambda name: name == "local" or ssh_command(name), "local")]
    python: Text
    latency_images: Count
    deadline_ms: Positive | None
    threads: Annotated[tuple[Threads, ...], Field(min_length=1), _ONCE]


@dataclass(frozen=True, config=_CONFIG)
class Tracking:
    """Whether runs are logged, where in MLflow, and what happens when it is away at start."""

    enabled: Switch
    experiment: Annotated[  # MLflow's registry refuses / and :, and its filters break at quotes
        str,
        _check(
            lambda name: name.strip() and name.isprintable() and not set("/:'\"`") & set(name),
            "a name without / : and quotes, since registered models are named after it",
        ),
    ]
    on_failure: Literal["fail", "warn"]


Images = Annotated[
    Whole | Number,
    _check(
        lambda n: 1 <= n <= 10**9 if isinstance(n, int) else 0 < n < 1,
        "a number of images (whole, at least 1) or a share such as 0.1",
    ),
]


Side = Annotated[Whole, Field(ge=8, le=1024, multiple_of=8)]


@dataclass(frozen=True, config=_CONFIG)
class Source:
    """A labelled image set and its splits: numbers of images (int), or shares of all (float)."""

    source: Literal["digits", "cifar10", "cifar100", "image_folder", "csv", "elpv"]
    image_size: Side | tuple[Side, Side]
    channels: Literal[1, 3]
    fit: Literal["crop", "pad", "stretch", "exact"]
    validation: Images
    calibration: Images
    test: Images | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        return (*sides(self.image_size), self.channels)


@dataclass(frozen=True, config=_CONFIG)
class Network:
    """A backbone of ours, of timm's, or the user's own; docs/backbones.md explains the keys."""

    network: str
    width: Annotated[Whole, Field(ge=1, le=1024)] | None = None
    stem: Literal["standard", "small"] = "standard"
    weights: Text | None = None
    trunk: Literal["finetuned", "frozen"] = "finetuned"

    def __post_init__(self) -> None:
        self.backbone(1, 2, 8)  # refuses unknown names and choices
        if self.trunk == "frozen" and self.weights is None:
            raise InputError(
                f"{self.network} has trunk: frozen and no weights, so nothing could be learnt from "
                "its features; set weights: pretrained, or a safetensors file"
            )

    def backbone(self, channels: int, classes: int, image_size: ImageSize) -> Backbone:
        """The network for such images and classes. Errors: InputError when there is none."""
        return Backbone(self.network, channels, classes, image_size, self.width, self.stem)


Rate = Annotated[Number, Field(gt=0, le=1000)]


@dataclass(frozen=True, config=_CONFIG)
class StageRecipe:
    """How long and how fast one network is trained."""

    epochs: Count
    learning_rate: Rate


@dataclass(frozen=True, config=_CONFIG)
class PhasedRecipe:
    """The same for an order's phases: `epochs` is one number for all, or one for each."""

    epochs: Count | tuple[Count, ...]
    learning_rate: Rate

    def phases(self, count: int) -> tuple[StageRecipe, ...]:
        """The recipes of an order's `count` phases."""
        epochs = [self.epochs] * count if isinstance(self.epochs, int) else self.epochs
        return tuple(StageRecipe(number, self.learning_rate) for number in epochs)


@dataclass(frozen=True, config=_CONFIG)
class Recipes:
    """How a profile trains; `warmup` is the share of the steps in which the rate rises."""

    batch_size: Annotated[Whole, Field(ge=2, le=65536)]
    warmup: Annotated[Number, Field(ge=0, lt=1)]
    train_teacher: StageRecipe
    distill: StageRecipe
    train_branchynet: PhasedRecipe


@dataclass(frozen=True, config=_CONFIG)
class Profile:
    """The data, the networks and their recipes."""

    data: Source
    teacher: Network
    student: Network
    augmentation: CropAndFlip
    recipes: Recipes

    def __post_init__(self) -> None:
        padding, side = self.augmentation.crop_padding, min(sides(self.data.image_size))
        if padding >= side:
            raise InputError(
                f"augmentation.crop_padding = {padding}; pad by less than the image's side, {side}"
            )


@dataclass(frozen=True, config=_CONFIG)
class Recipe(StageRecipe):
    """A stage's recipe with what all stages of a profile share."""

    batch_size: int
    warmup: float


@dataclass(frozen=True, config=_CONFIG)
class Plan:
    """What the fit loop is told, put together from several sections."""

    seed: int
    training: Training
    augmentation: Augmentation
    optimisation: Optimisation
    recipe: Recipe


@dataclass(frozen=True, config=_CONFIG)
class _Shared:
    """The sections that are the same for all profiles."""

    seed: Annotated[Whole, Field(ge=0, lt=2**31)]
    data: Data
    kd: KD
    student: Student
    branchynet: BranchyNet
    optimisation: Optimisation
    training: Training
    export: Export
    calibrate: Calibrate
    evaluate: Evaluate
    tracking: Tracking


@dataclass(frozen=True, config=_CONFIG)
class _File(_Shared):
    """params.yaml as it is written."""

    profile: str
    augmentation: Mixing
    profiles: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], Profile]

    def __post_init__(self) -> None:
        if self.profile not in self.profiles:
            known = ", ".join(self.profiles) or "those that you add to `profiles`"
            raise InputError(f"profile = {self.profile!r} is unknown; use one of {known}")


@dataclass(frozen=True, config=_CONFIG)
class Params(_Shared):
    """All of params.yaml, with only the chosen profile."""

    profile_name: str
    profile: Profile
    augmentation: Augmentation

    def plan(self, stage: StageRecipe) -> Plan:
        """What the fit loop is told when it follows a stage's recipe."""
        shared = self.profile.recipes
        recipe = Recipe(stage.epochs, stage.learning_rate, shared.batch_size, shared.warmup)
        return Plan(self.seed, self.training, self.augmentation, self.optimisation, recipe)


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml. Errors: InputError naming key, value and remedy."""
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run in the repository's root, where it is") from None
    except Exception as error:  # of many kinds; ruamel's advice for programmers is cut off
        reason = " ".join(str(error).partition("To suppress this check")[0].split())
        raise InputError(f"{path} cannot be read as YAML ({reason}); correct it") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold sections such as `kd:`, not {_shown(content)}")
    return parse(content, str(path))


def parse(content: Mapping[str, Any], where: str = "params.yaml") -> Params:
    """Build the parameters from the content of a params.yaml.

    Errors: InputError naming key, value and remedy. Every profile is checked, so a typo in one
    that is not chosen is reported too.
    """
    try:
        file = TypeAdapter(_File).validate_python(content)
    except ValidationError as error:
        raise InputError(f"{where}: {_message(error, content)}") from None
    profile = file.profiles[file.profile]
    shared = {field.name: getattr(file, field.name) for field in dataclasses.fields(_Shared)}
    augmentation = Augmentation(**vars(profile.augmentation), **vars(file.augmentation))
    params = Params(**shared, profile_name=file.profile, profile=profile, augmentation=augmentation)
    try:
        from_weights = params.profile.student.weights is not None
        exits = exit_count(resolve_layout(params.branchynet.layout, from_weights))
        if exits is not None:
            check_exits(params, exits)
        _check_together(params)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return params


def check_exits(params: Params, exits: int) -> None:
    """Refuse lists whose length does not fit the layout's exits or the order's phases.

    Errors: InputError. A stage calls it once it knows the network, since the exits of some layouts
    depend on it.
    """
    shares = len(params.calibrate.shares(exits))
    if shares != exits:
        raise InputError(
            f"calibrate.proportions has {shares} shares, the layout {exits} exits; give as many, "
            "or one number for all early exits"
        )
    votes = params.calibrate.votes
    if votes != "fitted" and (len(votes) != exits or not sum(votes)):
        raise InputError(
            f"calibrate.votes = {_shown(votes)}, but the layout has {exits} exits; give one weight "
            "for each, not all 0, or `fitted`"
        )
    order, depths = params.branchynet.order, tuple(range(1, exits + 1))
    epochs, phases = params.profile.recipes.train_branchynet.epochs, ORDERS[order](depths).phases
    codec = params.branchynet.codec
    if codec is not None:
        if codec.after > exits - 2:
            raise InputError(
                f"branchynet.codec.after = {codec.after}, but of {exits} exits the last one that "
                f"has others behind it is {exits - 2}"
            )
        phases = with_codec(ORDERS[order](depths), depths, codec.after).phases
    if isinstance(epochs, tuple) and len(epochs) != len(phases):
        raise InputError(
            f"profiles.{params.profile_name}.recipes.train_branchynet.epochs = {_shown(epochs)}, "
            f"but order {order}{', with a codec,' if codec else ''} has {len(phases)} phases; give "
            "as many numbers, or one for all"
        )


def _check_together(params: Params) -> None:
    """Refuse sections that contradict each other. Errors: InputError."""
    order, mixing = params.branchynet.order, params.augmentation
    if params.kd.source != "teacher" and order in ("asynchronous_back", "independent"):
        raise InputError(
            f"kd.source = {params.kd.source}, but with order {order} the main exit is not there "
            "to supervise the others; use -S kd.source=teacher"
        )
    if params.student.prune is not None:
        if order not in ("asynchronous", "mixed"):
            raise InputError(
                f"student.prune removes channels of the distilled main branch, and order {order} "
                "does not start from it; use -S branchynet.order=asynchronous or mixed, or set "
                "student.prune to null"
            )
        if params.profile.student.trunk == "frozen":
            raise InputError(
                f"student.prune changes the trunk, and profiles.{params.profile_name}.student has "
                "trunk: frozen; use trunk: finetuned, or set student.prune to null"
            )
    if params.branchynet.codec is not None and order == "independent":
        raise InputError(
            "branchynet.codec needs a trunk that exits share, but order is independent; use "
            "another order, or no codec"
        )
    side = max(sides(params.profile.data.image_size))
    if mixing.cutout >= side:
        raise InputError(
            f"augmentation.cutout = {mixing.cutout} erases whole images of {side} pixels; use a "
            "smaller square"
        )
    frozen = "frozen" in (params.profile.teacher.trunk, params.profile.student.trunk)
    if frozen and (mixing.mixup or mixing.cutmix):
        raise InputError(
            "augmentation.mixup and augmentation.cutmix mix images anew in every batch, but a "
            "frozen trunk sees each copy once; set both to 0, or trunk: finetuned"
        )


_WORDS = {  # pydantic's words where ours are plainer; `missing` and unknown keys are in _message
    "bool_type": "must be true or false",
    "dataclass_type": "must be a section with keys of its own",
    "dict_type": "must be a section with keys of its own",
    "tuple_type": "must be a list",
    "too_short": "must have at least one entry",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must hold letters, digits, _ and - alone",
}
_UNKNOWN = "unexpected_keyword_argument"


def _message(error: ValidationError, content: Any) -> str:
    """Key, value and remedy of one fault: an unknown key, else our own refusal, else the deepest.

    (A misspelt key is also missing; of a value with several forms the deepest fault fits best.)
    """
    rank = {_UNKNOWN: 2, "value_error": 1}
    faults = error.errors(include_url=False)
    fault = max(faults, key=lambda fault: (rank.get(fault["type"], 0), len(fault["loc"])))
    kind: Any = _File
    key, keys, missing = "", [], fault["type"] == "missing"
    for number, part in enumerate(fault["loc"], 1):
        index = isinstance(content, list) and isinstance(part, int)
        known = index or (isinstance(content, Mapping) and part in content)
        if not known and not (missing and number == len(fault["loc"])):
            continue  # not a key: pydantic's name for one form of a value
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
        keys = [field.name for field in dataclasses.fields(kind)]
        kind = _section(typing.get_type_hints(kind).get(str(part))) or kind
        content = content[part] if known else None
    key = key.removeprefix(".")
    if missing:
        return f"key `{key}` is missing; add it"
    if fault["type"] == _UNKNOWN:
        close = difflib.get_close_matches(str(fault["loc"][-1]), keys, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(keys)}"
        return f"unknown key `{key}` = {_shown(content)}; {hint}"
    reason = fault.get("ctx", {}).get("error")
    if isinstance(reason, InputError):
        return str(reason) if key in str(reason) else f"{key}: {reason}"
    words = fault["msg"].replace("Input should", "must").replace("Value error,", "is refused;")
    return f"{key} = {_shown(fault['input'])} {_WORDS.get(fault['type'], words)}"


def _section(hint: Any) -> Any:
    """The dataclass in a type such as `tuple[Requirement, ...]`; None where there is none."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next(filter(None, map(_section, typing.get_args(hint))), None)


def _shown(value: Any) -> str:
    """A value on one line, as JSON, which YAML reads."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):  # a key that is no text, a list inside itself
        text = str(value)
    return text if len(text) < 100 else f"{text[:90]}..."
