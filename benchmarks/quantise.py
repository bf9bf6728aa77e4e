"""Which operators int8 takes, and what fitting heads again gives.  python -m benchmarks.quantise

On the networks in models/ and the data of the last run. For each choice of operators: accuracy of
every exit on validation and calibration images, as quantised and with the last layers fitted again,
and milliseconds of the plain network, one thread, interleaved with fp32. `convolutions` is what
`export` does. `--speed NETWORK...` times other networks of timm, fresh, at 128x128. The last line
is JSON.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime.quantization as ort
import torch
from numpy.typing import NDArray

from edgeke.data.dataset import channels_last, load_dataset
from edgeke.device.session import open_session
from edgeke.device.timing import summary, time_interleaved
from edgeke.graph.quantise import quantise, quantise_segments
from edgeke.graph.refit import refit_heads
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_segments, export_static
from edgeke.learning.checkpoints import load_checkpoint
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import single_exit

_OURS = ("Conv", "MatMul", "Relu", "Clip", "MaxPool")
CHOICES: dict[str, Sequence[str] | None] = {
    "convolutions": _OURS,
    "and additions": (*_OURS, "Add"),
    "everything": None,  # as ONNX Runtime does by default, but for the linear layers
}
_quantize_static = ort.quantize_static


def choosing(kinds: Sequence[str] | None) -> Any:
    """ONNX Runtime's quantiser with other operators than ours."""

    def quantize(prepared: Path, target: Path, *arguments: Any, **options: Any) -> None:
        options["op_types_to_quantize"] = kinds
        nodes = onnx.load(prepared).graph.node
        linear = [node.name for node in nodes if node.op_type == "Gemm"]
        # "everything" takes the first convolution, too.
        options["nodes_to_exclude"] = options["nodes_to_exclude"] + linear if kinds else linear
        _quantize_static(prepared, target, *arguments, **options)

    return mock.patch.object(ort, "quantize_static", quantize)


def time_choices(model: onnx.ModelProto, images: NDArray[np.uint8]) -> dict[str, Any]:
    """Milliseconds of fp32 and of every choice."""
    sessions = {"fp32": open_session(model.SerializeToString(), 1)}
    for name, kinds in CHOICES.items():
        with choosing(kinds):
            sessions[name] = open_session(quantise(model, images[:16]).SerializeToString(), 1)
    without = quantise(model, images[:16], depthwise=False)
    sessions["without depthwise"] = open_session(without.SerializeToString(), 1)
    calls = {name: partial(s.run, None, {"image": images[:1]}) for name, s in sessions.items()}
    return {name: summary(ms) for name, ms in time_interleaved(calls, 200, 30).items()}


def accuracies() -> dict[str, dict[str, list[float]]]:
    """Percent at every exit, by choice: as quantised, and fitted again."""
    network, own = load_checkpoint(Path("models/branchynet"), torch.device("cpu"))
    names = ("train", "validation", "calibration")
    dataset = load_dataset(Path("data/dataset.safetensors"), names)
    train = channels_last(dataset["train"].images)
    images = np.concatenate([channels_last(dataset[name].images) for name in names[1:]])
    labels = np.concatenate([dataset[name].labels for name in names[1:]])
    exact = export_segments(network, own.mean, own.std, own.image_shape[2])

    def correct(models: Sequence[onnx.ModelProto]) -> list[float]:
        logits = segment_logits([model.SerializeToString() for model in models], images, 0)
        return [100 * float(share) for share in (logits.argmax(-1) == labels).mean(1)]

    table = {"fp32": {"as quantised": correct(exact)}}
    for name, kinds in [*CHOICES.items(), ("without depthwise", _OURS)]:
        with choosing(kinds):
            first = 0 if name == "without depthwise" else len(exact)
            coarse = quantise_segments(exact, train[:200], exact_from=first)
        refitted = refit_heads(coarse, exact, train[:5000])
        table[name] = {"as quantised": correct(coarse), "fitted again": correct(refitted)}
        print(name, table[name], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--speed", nargs="*", metavar="NETWORK")
    networks = parser.parse_args().speed
    result: dict[str, Any] = {}
    if networks is None:
        result["accuracy"] = accuracies()
        network, own = load_checkpoint(Path("models/plain"), torch.device("cpu"))
        _, height, width = own.image_shape
        images = load_dataset(Path("data/dataset.safetensors"), ("train",))["train"].images
        model = export_static(network, own.mean, own.std, (height, width))
        result["ms"] = {"plain": time_choices(model, channels_last(images[:16]))}
    else:
        noise = np.random.default_rng(0).integers(0, 256, (16, 128, 128, 3), np.uint8)
        result["ms"] = {}
        for name in networks:
            plain = BranchyNet(single_exit(Backbone(f"timm/{name}", 3, 10, 128))).eval()
            model = export_static(plain, (0.5,) * 3, (0.5,) * 3, 128)
            result["ms"][name] = time_choices(model, noise)
            print(name, result["ms"][name], flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
