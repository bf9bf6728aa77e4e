"""How fast is the one file beside what else a CPU can run?  python -m benchmarks.inference

One image at a time, all contenders interleaved in one process, on one thread and then on two:
PyTorch, the published layout (written afresh from its description), ONNX Runtime, OpenVINO and
earlyon against our file at every exit. Without --model the networks are built with random weights
(ResNet18, width 64, 32x32, 100 classes, layout `stages`): what a path costs does not depend on what
was learnt. PyTorch, the published layout and earlyon are handed a normalised float image; every
other contender takes the raw bytes. OpenVINO and earlyon come from benchmarks/requirements.txt;
without them their rows are left out. Prints tables, the aims and, last, one JSON line.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import compose, helper, parser
from torch import Tensor, nn
from torch._inductor import config as inductor

from edgeke.device.classifier import Classifier
from edgeke.device.policy import OperatingPoint, Policy, force_exit, parse_policy
from edgeke.device.scores import Score
from edgeke.device.session import open_session
from edgeke.device.timing import time_interleaved
from edgeke.graph.compose import compose_cascade
from edgeke.graph.quantise import quantise, quantise_segments
from edgeke.graph.segments import export_segments, export_static
from edgeke.networks.architecture import Architecture, block_names
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.heads import branch_head, main_head
from edgeke.networks.resnet import make_block

Call = Callable[[], Any]
Times = dict[str, list[float]]
Points = Mapping[str, tuple[float, ...]]

PRECISIONS = ("fp32", "int8")
OPTIONAL = ("openvino", "earlyon", "torch.compile")
INSTALL = "uv pip install -r benchmarks/requirements.txt"
# Stand-in for the shares of a trained network: which exit how many images leave at.
SHARES: Points = {"stand-in (0.4, 0.3, 0.2, 0.1)": (0.4, 0.3, 0.2, 0.1)}


@dataclass(frozen=True)
class Bench:
    """What is timed: the plain network, graphs by name, and the shares of operating points.

    `points` holds them per precision, by label: the share of images that pays for each exit.
    """

    plain: BranchyNet
    exits: int
    attached: tuple[int, ...]
    side: int
    graphs: Mapping[str, bytes]
    points: Mapping[str, Points]

    @property
    def channels(self) -> int:
        return self.plain.architecture.channels

    @property
    def classes(self) -> int:
        return self.plain.architecture.classes


def prepare(width: int, model: Path | None) -> Bench:
    """Build every graph; a trained file, and its int8 sibling, take the place of ours."""
    architecture, side = Architecture.with_layout("stages", "resnet18", width, 3, 100), 32
    if model is not None:
        described = json.loads((model.parent / "branchynet.json").read_text())
        architecture = Architecture.from_json(described["architecture"])
        side = open_session(model).get_inputs()[0].shape[1]
    torch.manual_seed(0)
    network = BranchyNet(architecture).eval()
    plain = BranchyNet(
        Architecture.single(
            architecture.backbone, architecture.width, architecture.channels, architecture.classes
        )
    ).eval()
    graphs, points = build(network, plain, side), dict.fromkeys(PRECISIONS, SHARES)
    if model is None:
        print("no trained network given: random weights, and stand-in shares for operating points")
    else:
        graphs["ours fp32"] = model.read_bytes()
        points = dict.fromkeys(PRECISIONS, shares(model))
        sibling = model.with_suffix(".int8.onnx")
        if sibling.is_file():
            graphs["ours int8"], points["int8"] = sibling.read_bytes(), shares(sibling)
        else:
            print(f"{sibling} is missing: the int8 rows are of the same network, untrained")
    return Bench(plain, len(network.exits), tuple(network.attached), side, graphs, points)


def shares(model: Path) -> Points:
    """The operating points that a file carries, by label."""
    carried = open_session(model).get_modelmeta().custom_metadata_map["policy"]
    return {label: point.shares for label, point in parse_policy(carried).named.items()}


def build(network: BranchyNet, plain: BranchyNet, side: int) -> dict[str, bytes]:
    """Our file, a static graph with all its heads, the plain network: fp32 and int8; an empty file.

    The static int8 rivals are quantised whole, ours segment by segment as in the pipeline.
    """
    channels, classes = network.architecture.channels, network.architecture.classes
    normalisation = ([0.5] * channels, [0.25] * channels, side)
    images = np.random.default_rng(0).integers(0, 256, (50, side, side, channels), np.uint8)
    segments = export_segments(network, *normalisation)
    same, alone = chain(segments), export_static(plain, *normalisation)

    def cascade(parts: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
        return compose_cascade(
            parts,
            score=Score("max_probability"),
            temperatures=[1.0] * len(parts),
            image_shape=(side, side, channels),
            classes=classes,
            metadata=carried(len(parts), classes, (side, side, channels)),
        )

    models = {
        "ours fp32": cascade(segments),
        "ours int8": cascade(quantise_segments(segments, images)),
        "same fp32": same,
        "same int8": quantise(same, images),
        "plain fp32": alone,
        "plain int8": quantise(alone, images),
        "empty": cascade(empty_segments(len(segments), classes)),
    }
    return {name: model.SerializeToString() for name, model in models.items()}


def chain(segments: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """All segments in a row as one straight-line graph: every exit's logits, no If."""
    parts = [
        compose.add_prefix(model, f"s{e}_", rename_inputs=e > 0) for e, model in enumerate(segments)
    ]
    whole = parts[0]
    for e, part in enumerate(parts[1:]):
        logits = [f"s{exit}_logits" for exit in range(e + 1)]
        features = [output.name for output in part.graph.output]
        whole = compose.merge_models(
            whole,
            part,
            io_map=[(f"s{e}_features", f"s{e + 1}_features_in")],
            outputs=[*logits, *features],
        )
    # Merging adds one more opset import each time, which the quantiser refuses.
    return helper.make_model(
        whole.graph, opset_imports=segments[0].opset_import, ir_version=segments[0].ir_version
    )


def carried(exits: int, classes: int, image_shape: tuple[int, int, int]) -> dict[str, str]:
    """Metadata that make a file a classifier's: a policy whose one point leaves at exit 0."""
    point = OperatingPoint(
        name="first",
        thresholds=force_exit(0, exits),
        votes=(1.0,) * exits,
        shares=force_exit(0, exits),
        reach_upper=(1.0,) * exits,
        voted=0.0,
        validation_accuracy=0.0,
        accuracy=0.0,
        accuracy_interval=(0.0, 1.0),
        loss=0.0,
        promises=(),
    )
    macs = tuple(range(1, exits + 1))
    policy = Policy(
        "max_probability", (), (1.0,) * exits, macs, 1, 1, 0.1, (point,), (), point.name
    )
    return {
        "policy": json.dumps(policy.to_json()),
        "classes": json.dumps([str(number) for number in range(classes)]),
        "image_shape": json.dumps(image_shape),
    }


def empty_segments(exits: int, classes: int) -> list[onnx.ModelProto]:
    """Segments that compute next to nothing: what a call costs beyond trunk and heads."""
    first = """
        zero = Constant <value_ints = [0]> ()
        one = Constant <value_ints = [1]> ()
        flat = Flatten (image)
        pixel = Slice (flat, zero, one, one)
        features = Cast <to = 1> (pixel)"""
    models = []
    for exit in range(exits):
        source = "uint8[N, H, W, C] image" if exit == 0 else "float[N, 1] features_in"
        rest = "" if exit == exits - 1 else ", float[N, 1] features"
        body = first if exit == 0 else "features = Identity (features_in)"
        models.append(
            parser.parse_model(
                f'<ir_version: 8, opset_import: ["" : 18]>'
                f"segment ({source}) => (float[N, {classes}] logits{rest}) {{ {body}\n"
                f"shape = Constant <value_ints = [1, {classes}]> ()\n"
                "logits = Expand (features, shape) }"
            )
        )
    return models


class Published(nn.Module):
    """The published layout and its cascade, from its description: layer3 is there twice."""

    def __init__(self, plain: Architecture) -> None:
        super().__init__()
        names, width, classes = block_names(plain.backbone), plain.width, plain.classes

        def blocks(*starts: str) -> nn.Sequential:
            return nn.Sequential(*(make_block(plain, name) for name in names if _in(name, starts)))

        self.fronts = nn.ModuleList(
            [blocks("stem", "layer1", "layer2"), blocks("layer3"), nn.Identity()]
        )
        self.branches = nn.ModuleList(
            [
                nn.Sequential(blocks("layer3"), branch_head(4 * width, classes)),
                nn.Sequential(blocks("layer4.0"), branch_head(8 * width, classes)),
                nn.Sequential(blocks("layer4"), main_head(8 * width, classes)),
            ]
        )

    def forward(self, features: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, int]:
        for exit, (front, branch) in enumerate(zip(self.fronts, self.branches, strict=True)):
            features = front(features)
            probabilities = branch(features).softmax(-1)
            if probabilities.max().item() > thresholds[exit]:
                break
        return probabilities, exit


def _in(name: str, starts: Sequence[str]) -> bool:
    return any(name == start or name.startswith(f"{start}.") for start in starts)


def contenders(bench: Bench, threads: int, without: Sequence[str]) -> dict[str, Call]:
    """One call per contender, on one random image."""
    torch.set_num_threads(threads)
    shape = (1, bench.side, bench.side, bench.channels)
    image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    calls = {**in_torch(bench, image, without), **in_runtime(bench, image, threads)}
    if "openvino" not in without:
        calls |= in_openvino(bench, image, threads)
    if "earlyon" not in without:
        calls |= in_earlyon(bench, image, threads)
    return calls


def in_torch(bench: Bench, image: NDArray[np.uint8], without: Sequence[str]) -> dict[str, Call]:
    """The plain network eager and compiled, and the published layout at each of its exits."""
    ready = _normalised(image)
    published = Published(bench.plain.architecture).eval()
    calls = {"PyTorch eager": _inference(bench.plain, ready)}
    if "torch.compile" not in without:
        # Weights as constants: without it the compiled network is slower than eager. Read whenever
        # it compiles, again for each number of threads; as an option of the call it does nothing.
        inductor.freezing = True
        calls["torch.compile"] = _inference(torch.compile(bench.plain), ready)
    for exit in range(3):
        calls[f"published exit {exit}"] = _inference(published, ready, force_exit(exit, 3))
    return calls


def in_runtime(bench: Bench, image: NDArray[np.uint8], threads: int) -> dict[str, Call]:
    """ONNX Runtime: the static rivals, and our file at every exit."""
    calls: dict[str, Call] = {}
    for precision in PRECISIONS:
        for rival in ("plain", "same"):
            session = open_session(bench.graphs[f"{rival} {precision}"], threads)
            calls[f"ONNX Runtime {rival} {precision}"] = _run(session, {"image": image})
        session = open_session(bench.graphs[f"ours {precision}"], threads)
        for exit, feeds in enumerate(_forced(bench, image)):
            calls[f"EdgeKE {precision} exit {exit}"] = _run(session, feeds)
    return calls


def around_the_graph(bench: Bench, threads: int) -> dict[str, Call]:
    """Calls on a file that computes next to nothing: what remains is the call itself.

    They run among themselves, not behind large networks that empty the caches.
    """
    image = np.zeros((1, bench.side, bench.side, bench.channels), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "edgeke.onnx"
        file.write_bytes(bench.graphs["empty"])
        classifier = Classifier(file, threads=threads)
    session = open_session(bench.graphs["empty"], threads)
    first, *_, last = _forced(bench, image)
    deepest = classifier.forced(bench.exits - 1)
    return {
        "empty file, first exit: session.run": _run(session, first),
        "empty file, last exit: session.run": _run(session, last),
        "empty file, first exit: Classifier.predict": lambda: classifier.predict(image[0]),
        "empty file, last exit: Classifier.predict": lambda: deepest(image[0]),
    }


def in_openvino(bench: Bench, image: NDArray[np.uint8], threads: int) -> dict[str, Call]:
    """OpenVINO: the plain network, and our very file at every exit."""
    import openvino

    core = openvino.Core()
    # Without the last key it computes fp32 networks in bfloat16 on CPUs that have it.
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }

    def request(graph: str) -> Any:
        model = core.read_model(bench.graphs[graph])
        if graph.startswith("plain"):
            model.reshape({"image": list(image.shape)})
        return core.compile_model(model, "CPU", settings).create_infer_request()

    def infer(made: Any, feeds: Mapping[str, Any]) -> Call:
        return lambda: made.infer(feeds, share_inputs=True)

    calls: dict[str, Call] = {}
    for precision in PRECISIONS:
        plain, ours = request(f"plain {precision}"), request(f"ours {precision}")
        calls[f"OpenVINO plain {precision}"] = infer(plain, {"image": image})
        for exit, feeds in enumerate(_forced(bench, image)):
            calls[f"EdgeKE {precision} exit {exit} in OpenVINO"] = infer(ours, feeds)
    return calls


def in_earlyon(bench: Bench, image: NDArray[np.uint8], threads: int) -> dict[str, Call]:
    """The earlyon toolkit with exits where ours are: eager, and its ONNX file."""
    from earlyon.models.custom import custom_ee
    from earlyon.onnx import export_to_onnx

    ready = _normalised(image)
    names = [str(end - 1) for end in bench.attached[:-1]]
    backbone = nn.Sequential(*bench.plain.trunk, *bench.plain.exits[0].head).eval()
    wrapper = custom_ee(backbone, names, bench.classes, input_shape=tuple(ready.shape)).eval()

    def leave(exit: int) -> Call:
        # Its score lies in [0, 1], and an exit is taken at a score of at least the threshold.
        thresholds = [0.0 if e == exit else 1.0 for e in range(len(names))]

        def call() -> Any:
            wrapper.config.confidence_thresholds = thresholds
            return wrapper(ready)

        return call

    calls = {f"earlyon exit {exit}": leave(exit) for exit in range(bench.exits)}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper(ready)  # the first call counts operations, and warns
        file = Path(folder) / "earlyon.onnx"
        export_to_onnx(wrapper, file, tuple(ready.shape), opset=18)
        session = open_session(file.read_bytes(), threads)
    return calls | {"earlyon ONNX (all exits)": _run(session, {"input": ready.numpy()})}


def _normalised(image: NDArray[np.uint8]) -> Tensor:
    """As PyTorch runs it fastest: with the strides of the raw bytes it takes twice as long."""
    return (
        torch.from_numpy(image).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25).contiguous()
    )


def _inference(module: Callable[..., Any], *inputs: Any) -> Call:
    def call() -> Any:
        with torch.inference_mode():
            return module(*inputs)

    return call


def _run(session: Any, feeds: Mapping[str, Any]) -> Call:
    return lambda: session.run(None, feeds)


def _forced(bench: Bench, image: NDArray[np.uint8]) -> list[dict[str, Any]]:
    """Feeds that make our file leave at each exit in turn."""
    votes = np.ones(bench.exits, np.float32)
    return [
        {
            "image": image,
            "thresholds": np.float32(force_exit(exit, bench.exits)),
            "votes": votes,
        }
        for exit in range(bench.exits)
    ]


def summarise(
    bench: Bench, times: Times, typical: Callable[[list[float]], float] = min
) -> dict[str, Any]:
    """Ratios of the minima, or of another statistic; None where a contender was left out.

    The call itself is given by its median either way.
    """
    best = {name: typical(values) for name, values in times.items()}
    last = bench.exits - 1

    def ratio(over: str, under: str) -> float | None:
        return round(best[over] / best[under], 3) if over in best and under in best else None

    static = [name for name in best if name.endswith("plain int8")]
    fastest = min(static, key=lambda name: best[name])
    result: dict[str, Any] = {
        f"full_path_over_{rival}_{precision}": ratio(
            f"EdgeKE {precision} exit {last}",
            f"ONNX Runtime {rival.removesuffix('_static')} {precision}",
        )
        for rival in ("same_static", "plain")
        for precision in PRECISIONS
    }
    first = "EdgeKE int8 exit 0"
    result |= {
        "exit0_speedup_over_published": ratio("published exit 0", first),
        "exit0_speedup_over_fastest_static": ratio(fastest, first),
        "fastest_static": fastest,
        "exit0_speedup_over_onnxruntime_static": ratio("ONNX Runtime plain int8", first),
        "exit0_speedup_in_openvino": ratio(fastest, f"{first} in OpenVINO"),
    }
    for precision in PRECISIONS:
        key = "speedup_over_earlyon" + ("" if precision == "int8" else "_fp32")
        result[key] = {
            f"exit {e}": ratio(f"earlyon exit {e}", f"EdgeKE {precision} exit {e}")
            for e in range(bench.exits)
        }
    result["full_path_speedup_over_earlyon_onnx"] = ratio(
        "earlyon ONNX (all exits)", f"EdgeKE int8 exit {last}"
    )
    for key, where in (("call_overhead_us", "first"), ("call_overhead_full_path_us", "last")):
        spent = times[f"empty file, {where} exit: Classifier.predict"]
        result[key] = round(float(np.median(spent)) * 1e3, 1)
    result["operating_points_ms"] = {
        precision: {
            label: round(
                sum(s * best[f"EdgeKE {precision} exit {e}"] for e, s in enumerate(leaving)), 3
            )
            for label, leaving in bench.points[precision].items()
        }
        for precision in PRECISIONS
    }
    return result


def aims(result: Mapping[str, Any]) -> list[tuple[str, float | None, str, float]]:
    """What was asked for: text, what was found, how it must compare, with what."""
    earlyon = result["speedup_over_earlyon"].values()
    slowest = None if None in earlyon else min(earlyon)
    return [
        ("full path / same static, fp32", result["full_path_over_same_static_fp32"], "<=", 1.05),
        ("full path / same static, int8", result["full_path_over_same_static_int8"], "<=", 1.05),
        ("full path / plain, fp32", result["full_path_over_plain_fp32"], "<=", 1.10),
        ("full path / plain, int8", result["full_path_over_plain_int8"], "<=", 1.20),
        ("published exit 0 / ours, int8", result["exit0_speedup_over_published"], ">=", 6.0),
        (
            f"{result['fastest_static']} / exit 0, int8",
            result["exit0_speedup_over_fastest_static"],
            ">=",
            2.5,
        ),
        ("earlyon / ours at its worst exit, int8", slowest, ">=", 2.0),
        ("call overhead, microseconds", result["call_overhead_us"], "<=", 60.0),
    ]


def report(times: Times, result: Mapping[str, Any], threads: int) -> None:
    """Print the contenders, the operating points and the aims."""
    rival = min(times["ONNX Runtime plain int8"])
    print(f"\n| contender, threads: {threads} | min ms | median | p95 | ORT plain int8 / it |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in times.items():
        spread = f"{np.median(values):.3f} | {np.percentile(values, 95):.3f}"
        print(f"| {name} | {min(values):.3f} | {spread} | {rival / min(values):.2f} |")
    print("\n| operating point (shares times the exits' minima) | precision | ms |")
    print("| --- | --- | --- |")
    for precision, points in result["operating_points_ms"].items():
        for label, spent in points.items():
            print(f"| {label} | {precision} | {spent:.3f} |")
    print("\n| aim | bound | by minima | met | by medians | met |")
    print("| --- | --- | --- | --- | --- | --- |")
    for least, usual in zip(aims(result), aims(result["by_medians"]), strict=True):
        text, _, sign, bound = least
        print(f"| {text} | {sign} {bound:g} | {_verdict(*least)} | {_verdict(*usual)} |")


def _verdict(text: str, found: float | None, sign: str, bound: float) -> str:
    if found is None:
        return "left out | "
    met = found <= bound if sign == "<=" else found >= bound
    return f"{found:g} | {'yes' if met else 'no'}"


def missing(without: Sequence[str]) -> list[str]:
    """Contenders that cannot run here or are not wanted; says how to add them."""
    absent = [name for name in OPTIONAL[:2] if importlib.util.find_spec(name) is None]
    if absent:
        print(f"left out: {', '.join(absent)}; add them with `{INSTALL}`")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("left out: torch.compile; install a C++ compiler")
        absent.append("torch.compile")
    return sorted({*absent, *without})


def main() -> None:
    """Print a table per number of threads, then one JSON line (the ratios on the first number)."""
    argparser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    argparser.add_argument("--model", type=Path, help="a trained file, such as models/edgeke.onnx")
    argparser.add_argument("--width", type=int, default=64, help="width of the network built here")
    argparser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    argparser.add_argument("--rounds", type=int, default=200)
    argparser.add_argument("--without", choices=OPTIONAL, nargs="+", default=[])
    options = argparser.parse_args()
    without = missing(options.without)
    bench = prepare(options.width, options.model)
    results = {}
    for threads in options.threads:
        times = time_interleaved(contenders(bench, threads, without), options.rounds, math.inf)
        times |= time_interleaved(around_the_graph(bench, threads), options.rounds, math.inf)
        medians = summarise(bench, times, lambda values: float(np.median(values)))
        results[threads] = {**summarise(bench, times), "by_medians": medians}
        report(times, results[threads], threads)
    main_threads, *others = options.threads
    print(
        json.dumps(
            {
                **results[main_threads],
                "threads": main_threads,
                "on_other_threads": {str(threads): results[threads] for threads in others},
                "left_out": without,
            }
        )
    )


if __name__ == "__main__":
    main()
