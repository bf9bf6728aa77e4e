"""How fast is the one file beside what else a CPU can run?  python -m benchmarks.inference

One image at a time, everything interleaved in one process: PyTorch, the published layout (written
afresh from its description), ONNX Runtime and, where it is installed, OpenVINO run the plain main
network, and our file leaves at every exit. The weights are random: what a path costs does not
depend on what was learnt. PyTorch and the published layout get a normalised float image, everything
else the raw bytes. Prints a table per number of threads and, last, one JSON line.
"""

import argparse
import copy
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeke.device.policy import force_exit
from edgeke.device.scores import Score
from edgeke.device.session import open_session
from edgeke.device.timing import time_interleaved
from edgeke.graph.compose import compose_cascade
from edgeke.graph.quantise import quantise, quantise_segments
from edgeke.graph.segments import export_segments, export_static
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.heads import branch_head, linear_head
from edgeke.networks.layouts import single_exit, with_layout
from edgeke.networks.resnet import resnet18

Call = Callable[[], Any]

SIDE, CHANNELS, CLASSES = 32, 3, 100
PRECISIONS = ("fp32", "int8")


class Published(nn.Module):
    """The published layout and its cascade: layer3 is computed twice."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        network = resnet18(backbone)
        width = network.stem.conv.out_channels
        layer3, layer4 = network.layer3, network.layer4
        first = nn.Sequential(network.stem, network.layer1, network.layer2)
        self.fronts = nn.ModuleList([first, layer3, nn.Identity()])
        self.branches = nn.ModuleList(
            [
                nn.Sequential(copy.deepcopy(layer3), branch_head(4 * width, CLASSES)),
                nn.Sequential(copy.deepcopy(layer4[0]), branch_head(8 * width, CLASSES)),
                nn.Sequential(layer4, linear_head(8 * width, CLASSES)),
            ]
        )

    def forward(self, features: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, int]:
        """Probabilities `[1, K]` of the first exit above its threshold, and its number."""
        for exit, (front, branch) in enumerate(zip(self.fronts, self.branches, strict=True)):
            features = front(features)
            probabilities = branch(features).softmax(-1)
            if probabilities.max().item() > thresholds[exit]:
                break
        return probabilities, exit


def build(network: BranchyNet, plain: BranchyNet) -> dict[str, bytes]:
    """ONNX files by name: `one file` with exits and `plain`, each in fp32 and int8."""
    normalisation = ([0.5] * CHANNELS, [0.25] * CHANNELS, SIDE)
    images = np.random.default_rng(0).integers(0, 256, (50, SIDE, SIDE, CHANNELS), np.uint8)
    segments, static = (
        export_segments(network, *normalisation),
        export_static(plain, *normalisation),
    )

    def cascade(parts: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
        return compose_cascade(
            parts,
            score=Score("max_probability"),
            temperatures=[1.0] * len(parts),
            image_shape=(SIDE, SIDE, CHANNELS),
            classes=CLASSES,
            metadata={},
        )

    models = {
        "one file fp32": cascade(segments),
        "one file int8": cascade(quantise_segments(segments, images)),
        "plain fp32": static,
        "plain int8": quantise(static, images),
    }
    return {name: model.SerializeToString() for name, model in models.items()}


def calls(
    plain: BranchyNet, files: Mapping[str, bytes], exits: int, threads: int
) -> dict[str, Call]:
    """One call for each row of the table, on one random image."""
    torch.set_num_threads(threads)
    image = np.random.default_rng(1).integers(0, 256, (1, SIDE, SIDE, CHANNELS), np.uint8)
    named = in_torch(plain, image) | in_onnxruntime(files, image, exits, threads)
    return named | (in_openvino(files, image, exits, threads) if has_openvino() else {})


def in_torch(plain: BranchyNet, image: NDArray[np.uint8]) -> dict[str, Call]:
    """The plain network eager, and the published layout at each of its exits."""
    # Contiguous: with the strides of the raw bytes PyTorch takes twice as long.
    ready = torch.from_numpy(image).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    published = Published(plain.architecture.backbone).eval()

    def run(module: nn.Module, *inputs: Any) -> Any:
        with torch.inference_mode():
            return module(*inputs)

    named: dict[str, Call] = {"PyTorch plain": partial(run, plain, ready.contiguous())}
    for exit in range(3):
        thresholds = force_exit(exit, 3)
        named[f"published exit {exit}"] = partial(run, published, ready.contiguous(), thresholds)
    return named


def in_onnxruntime(
    files: Mapping[str, bytes], image: NDArray[np.uint8], exits: int, threads: int
) -> dict[str, Call]:
    """The plain network, and our file at every exit."""
    named: dict[str, Call] = {}
    for precision in PRECISIONS:
        plain = open_session(files[f"plain {precision}"], threads)
        ours = open_session(files[f"one file {precision}"], threads)
        named[f"ONNX Runtime plain {precision}"] = partial(plain.run, None, {"image": image})
        for exit, inputs in enumerate(forced(image, exits)):
            named[f"EdgeKE {precision} exit {exit}"] = partial(ours.run, None, inputs)
    return named


def has_openvino() -> bool:
    """Whether OpenVINO can be imported."""
    return importlib.util.find_spec("openvino") is not None


def in_openvino(
    files: Mapping[str, bytes], image: NDArray[np.uint8], exits: int, threads: int
) -> dict[str, Call]:
    """The plain network, and our very file at every exit."""
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 on CPUs that have it
    }

    def request(file: str) -> Any:
        model = core.read_model(files[file])
        if file.startswith("plain"):
            model.reshape({"image": list(image.shape)})
        return core.compile_model(model, "CPU", settings).create_infer_request()

    named: dict[str, Call] = {}
    for precision in PRECISIONS:
        plain, ours = request(f"plain {precision}"), request(f"one file {precision}")
        named[f"OpenVINO plain {precision}"] = partial(
            plain.infer, {"image": image}, share_inputs=True
        )
        for exit, inputs in enumerate(forced(image, exits)):
            name = f"EdgeKE {precision} exit {exit} in OpenVINO"
            named[name] = partial(ours.infer, inputs, share_inputs=True)
    return named


def forced(image: NDArray[np.uint8], exits: int) -> list[dict[str, Any]]:
    """Inputs that make our file leave at each exit in turn."""
    same = {
        "image": image,
        "votes": np.ones(exits, np.float32),
        "bias": np.zeros(CLASSES, np.float32),
    }
    return [{**same, "thresholds": np.float32(force_exit(exit, exits))} for exit in range(exits)]


def ratios(best: Mapping[str, float], exits: int) -> dict[str, Any]:
    """Speed-ups of our file, from one number of milliseconds per row."""
    static = [name for name in best if "plain" in name]
    fastest = min(static, key=lambda name: best[name])
    first = best["EdgeKE int8 exit 0"]
    result: dict[str, Any] = {
        f"full_path_over_plain_{precision}": round(
            best[f"EdgeKE {precision} exit {exits - 1}"] / best[f"ONNX Runtime plain {precision}"],
            3,
        )
        for precision in PRECISIONS
    }
    return result | {
        "exit_0_speedup_over_published": round(best["published exit 0"] / first, 3),
        "exit_0_speedup_over_onnxruntime": round(best["ONNX Runtime plain int8"] / first, 3),
        "exit_0_speedup_over_fastest_static": round(best[fastest] / first, 3),
        "fastest_static": fastest,
    }


def report(times: Mapping[str, Sequence[float]], threads: int) -> None:
    """Print a table in Markdown."""
    plain = min(times["ONNX Runtime plain int8"])
    print(f"\n| threads: {threads} | min ms | median | p95 | ONNX Runtime plain int8 / it |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in times.items():
        rest = f"{np.median(values):.3f} | {np.percentile(values, 95):.3f}"
        print(f"| {name} | {min(values):.3f} | {rest} | {plain / min(values):.2f} |")


def main() -> None:
    """Print a table per number of threads, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=("stages", "edgeke"), default="stages")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    if not has_openvino():
        print("OpenVINO is left out: it comes with requirements-test.txt")
    torch.manual_seed(0)
    backbone = Backbone("resnet18", CHANNELS, CLASSES, SIDE, options.width)
    network = BranchyNet(with_layout(options.layout, backbone)).eval()
    plain, exits = BranchyNet(single_exit(backbone)).eval(), len(network.exits)
    files, results = build(network, plain), {}
    for threads in options.threads:
        named = calls(plain, files, exits, threads)
        times = time_interleaved(named, options.rounds, math.inf)
        report(times, threads)
        minima = {name: min(values) for name, values in times.items()}
        medians = {name: float(np.median(values)) for name, values in times.items()}
        results[f"threads_{threads}"] = {
            "by_minima": ratios(minima, exits),
            "by_medians": ratios(medians, exits),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
