"""Edge and cloud against its alternatives.  python -m benchmarks.partition [--bundle models]

(1) The codecs on the features of test images after every exit: bytes, error, speed; beside them
float16 and one range for the whole map (what JMDC's formula says).
(2) Real processes: the server, a proxy that is the link (benchmarks/link.py), and the device under
a CPU quota (cgroup v1; skipped where that is not writable). At every rate, delay and slowness the
mean and 95th percentile of milliseconds, bytes per image, and accuracy, of: `local_full` (the last
exit), `local` (the policy's default point), `raw` (the picture to the server), `neurosurgeon` (the
best fixed partition, f32, no exits), `jmdc` (the best fixed partition and codec, no exits), `ours`.
Needs a bundle that was calibrated with the partitions to compare, `f32` among them.
The last line is JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.link import Link
from benchmarks.serving import Running
from edgeke.data.dataset import channels_last, load_dataset
from edgeke.device.choice import Request
from edgeke.device.classifier import Classifier
from edgeke.device.codec import RAW, decode, decode_picture, encode, parse_codec
from edgeke.device.link import Reply
from edgeke.device.remote_rest import RemoteRest

PORT = 18_573
_CGROUP = Path("/sys/fs/cgroup/cpu")
_PERIOD = 16_000  # microseconds: the slowest device then has the least quota, 1 ms


def codec_rows(classifier: Classifier, images: np.ndarray) -> list[dict[str, Any]]:
    """Each codec on the features after each exit; errors over the features' standard deviation."""
    segments, features, rows = classifier.open_segments(), images[:64], []
    for after in range(len(classifier.policy.macs) - 1):
        features = segments.logits(after, features)[1]
        results: list[tuple[str, float, np.ndarray, float]] = []
        for name in ("f32", "f16", "q8", "q6", "q4", "q2", "q8_r50", "q4_r50", "q2_r50"):
            codec = parse_codec(name)
            for pack in (False, True):
                messages, times = [], []
                for each in features:
                    started = time.perf_counter()
                    messages.append(encode(each[None], codec, pack))
                    times.append(time.perf_counter() - started)
                back = np.concatenate([decode(m, features.shape[1:], 1) for m in messages])
                length = float(np.mean([len(message) for message in messages]))
                results.append((name + (" zlib" if pack else ""), length, back, min(times)))
        for bits in (8, 4, 2):  # one range for the whole map
            axes = (1, 2, 3)
            low, high = features.min(axes, keepdims=True), features.max(axes, keepdims=True)
            step = (high - low) / (2**bits - 1)
            back = np.rint((features - low) / step) * step + low
            length = features[0].size * bits / 8 + 8
            results.append((f"one range, {bits} bits", length, back, np.inf))
        for name, length, back, seconds in results:
            error = float(np.sqrt(np.mean((back - features) ** 2)) / features.std())
            speed = features[:1].nbytes / seconds / 1e9
            rows.append(
                {"after": after, "codec": name, "bytes": length, "error": error, "gb_s": speed}
            )
    return rows


class Emulated:
    """A link without a network: the server's segments run here, so that accuracy can be counted."""

    def __init__(self, classifier: Classifier) -> None:
        self.segments, self.shape = classifier.open_segments(), classifier.image_shape
        self.exits = len(classifier.policy.macs)

    def head_bytes(self, _: str) -> int:
        return 0

    def exchange(self, after: str, message: bytes, until: float, deadline: bool) -> Reply:
        if after == RAW:
            k, features = -1, decode_picture(message, self.shape)[None]
        else:
            k = int(after)
            features = decode(message, self.segments.features_shape(k), 1)
        for exit in range(k + 1, self.exits):
            probabilities, features = self.segments.probabilities(exit, features)
        return Reply(probabilities, 0.0, len(message))


class Contenders:
    """What is compared, as functions of an image; the fixed ones choose anew on every link."""

    def __init__(self, device: Classifier, images: np.ndarray, labels: np.ndarray) -> None:
        self.device, self.rest = device, device._rest
        self.images, self.labels = images, labels
        exits = len(device.policy.macs)
        self.local = Classifier(device.bundle.model.parent, device.bundle.precision)
        self.full = device.forced(exits - 1)
        self._known: dict[Any, tuple[float, float]] = {}

    def choose(self) -> dict[str, Any]:
        """For each contender the way and the point that it uses on the link as it is now."""
        rest, measured = self.rest, self.device.measured
        rest._latest = None
        patient = [(w, rest._costs(w, measured, worst=False)[-1]) for w in rest._ways]
        local = (None, measured.median_ms[-1])
        codecs = {"raw": [], "neurosurgeon": [local], "jmdc": [local]}
        for way, cost in patient:
            kind = way.partition.codec
            if kind == RAW:
                for each in codecs.values():
                    each.append((way, cost))
            elif kind == "f32" and not way.pack:
                codecs["neurosurgeon"].append((way, cost))
            elif kind.startswith("q") and "_r" not in kind and not way.pack:
                codecs["jmdc"].append((way, cost))
        best = {name: min(ways, key=lambda each: each[1])[0] for name, ways in codecs.items()}
        chosen = {
            name: (way, way and way.partition.policy.point("full")) for name, way in best.items()
        }
        way, point = rest._plan(Request(), measured)
        return {
            "local_full": (None, None),
            "local": (None, self.local.policy.point(self.local.policy.default)),
            **chosen,
            "ours": (way, point),
        }

    def run(self, name: str, image: np.ndarray, way: Any, point: Any) -> int:
        """Bytes sent for an image."""
        if name == "ours":
            return self.device.predict(image).sent_bytes
        if way is not None:
            started = time.monotonic()
            answer = self.rest._partly(way, point, image, Request(), self.device.measured, started)
            return answer.sent_bytes
        self.local.predict(image) if name == "local" else self.full(image)
        return 0

    def accuracy(self, way: Any, point: Any) -> tuple[float, float]:
        """Accuracy and share of images sent, on all test images, without a network."""
        key = (way and (way.partition.name,), point and point.name)
        if key not in self._known:
            right = sent = 0
            rest = object.__new__(RemoteRest)
            rest._classifier, rest.link, rest._patience = self.device, Emulated(self.device), 1e9
            for image, label in zip(self.images, self.labels, strict=True):
                if way is None and point is None:
                    right += self.full(image).label == label
                elif way is None:
                    right += int(self.device.run_at(image, point)[0].argmax()) == label
                else:
                    answer = rest._partly(
                        way, point, image, Request(), self.device.measured, time.monotonic()
                    )
                    right += int(answer.probabilities.argmax()) == label
                    sent += answer.place == "server"
            self._known[key] = right / len(self.labels), sent / len(self.labels)
        return self._known[key]


def device_process(options: argparse.Namespace) -> None:
    """One slowness: reads links from standard input, writes rows to standard output."""
    split = load_dataset(options.data, ("test",))["test"]
    images = channels_last(split.images)
    device = Classifier(options.bundle, server=options.server, patience_ms=60_000)
    device.profile(seconds=5.0)
    contenders = Contenders(device, images, split.labels)
    for line in sys.stdin:
        probes = json.loads(line)
        for _ in range(probes):
            device._rest.link.probe()
        chosen = contenders.choose()
        times: dict[str, list[float]] = {name: [] for name in chosen}
        sent: dict[str, list[int]] = {name: [] for name in chosen}
        ended, turn = dict.fromkeys(chosen, 0.0), 0
        while any(ended[n] < options.seconds or len(times[n]) < 3 for n in chosen):
            for name, (way, point) in chosen.items():
                if ended[name] >= options.seconds and len(times[name]) >= 3:
                    continue
                started = time.perf_counter()
                size = contenders.run(name, images[turn % len(images)], way, point)
                took = time.perf_counter() - started
                times[name].append(1e3 * took)
                sent[name].append(size)
                ended[name] += took
            turn += 1
            if turn >= options.images:
                break
        row = {}
        way, point = contenders.rest._plan(Request(), device.measured)
        chosen["ours"] = (way, point)
        for name, (way, point) in chosen.items():
            accuracy, share = contenders.accuracy(way, point)
            row[name] = {
                "mean": float(np.mean(times[name])),
                "p95": float(np.percentile(times[name], 95)),
                "bytes": float(np.mean(sent[name])),
                "accuracy": accuracy,
                "sent_share": share,
                "way": "device" if way is None else way.partition.name,
            }
        print(json.dumps(row), flush=True)


def slowed(process: int, times: int) -> Path | None:
    """Put a process under a quota of a core; None where there is none to be had."""
    group = _CGROUP / f"edgeke-benchmark-{process}"
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD))
        (group / "cpu.cfs_quota_us").write_text(str(_PERIOD // times))
        (group / "cgroup.procs").write_text(str(process))
    except OSError:
        return None
    return group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=Path("models"))
    parser.add_argument("--data", type=Path, default=Path("data/dataset.safetensors"))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 1, 10, 100, 1000])
    parser.add_argument("--delays", type=float, nargs="+", default=[1, 10, 50])
    parser.add_argument("--slowness", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each contender and point")
    parser.add_argument("--images", type=int, default=40, help="of each contender and point")
    parser.add_argument("--picture", type=Path, help="an SVG of latency against bandwidth")
    parser.add_argument("--rows", type=Path, help="where all numbers go, as JSON")
    parser.add_argument("--server", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.server:
        device_process(options)
        return
    split = load_dataset(options.data, ("test",))["test"]
    codecs = codec_rows(Classifier(options.bundle), channels_last(split.images))
    for row in codecs:
        speed = f"{row['gb_s']:6.2f} GB/s" if row["gb_s"] else ""
        print(f"after {row['after']} {row['codec']:20} {row['bytes']:9.0f} bytes "
              f"error {row['error']:.4f} {speed}", flush=True)  # fmt: skip
    command = [sys.executable, "-m", "edgeke.serving", str(options.bundle), "--log-level", "error"]
    rows: list[dict[str, Any]] = []
    with Running([*command, "--port", str(PORT)], PORT), Link("127.0.0.1", PORT) as link:
        for times in options.slowness:
            rows += _measure(options, link, times)
    result = _summary(rows)
    if options.rows:
        options.rows.write_text(json.dumps({"codecs": codecs, "points": rows}, indent=1))
    if options.picture:
        _draw(rows, options.picture)
    print(json.dumps(result))


def _measure(options: argparse.Namespace, link: Link, times: int) -> list[dict[str, Any]]:
    server = f"http://127.0.0.1:{link.port}"
    command = [sys.executable, "-m", "benchmarks.partition", "--server", server]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    link.set()
    folder = tempfile.TemporaryDirectory()  # the profile of a slowed device is for no one else
    bundle = shutil.copytree(options.bundle / "segments", Path(folder.name) / "segments").parent
    for file in options.bundle.glob("edgeke*.onnx"):
        shutil.copy(file, bundle)
    command += ["--bundle", str(bundle)]
    for name in ("data", "seconds", "images"):
        command += [f"--{name}", str(getattr(options, name))]
    pipe = subprocess.PIPE
    device = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
    group = slowed(device.pid, times) if times > 1 else None
    if times > 1 and group is None:
        print(f"no CPU quota here: the device {times} times slower is left out")
        device.kill()
        device.wait()
        return []
    rows = []
    try:
        for rate in options.rates:
            for delay in options.delays:
                link.set(rate_mbit=rate, delay_ms=delay)
                device.stdin.write("2\n")
                device.stdin.flush()
                line = device.stdout.readline()
                if not line:
                    raise SystemExit("the device's process ended")
                point = {"slowness": times, "rate_mbit": rate, "delay_ms": delay}
                rows.append({**point, "contenders": json.loads(line)})
                words = [
                    f"{name} {row['mean']:.1f} ms ({row['way']}, {row['bytes']:.0f} B, "
                    f"{100 * row['accuracy']:.1f} %)"
                    for name, row in rows[-1]["contenders"].items()
                ]
                print(*point.values(), *words, flush=True)
    finally:
        device.stdin.close()
        device.kill()
        device.wait()
        if group is not None:
            group.rmdir()
        folder.cleanup()
    return rows


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The three numbers, and where they are; `local` has our exits, so it is told apart."""
    slower, faster, without, ratios = [], [], [], []
    for row in rows:
        every = row["contenders"]
        ours, raw = every["ours"], every["raw"]
        others = {name: each["mean"] for name, each in every.items() if name != "ours"}
        point = {key: row[key] for key in ("slowness", "rate_mbit", "delay_ms")}
        slower.append((ours["mean"] / min(others.values()) - 1, point))
        faster.append((min(others.values()) / ours["mean"], point))
        others.pop("local")
        without.append((min(others.values()) / ours["mean"], point))
        if ours["accuracy"] >= raw["accuracy"] - 0.01:
            ratios.append(raw["bytes"] / max(1.0, ours["bytes"]))
    return {
        "points": len(rows),
        "worst_slowdown": max(slower, key=lambda each: each[0]),
        "best_speedup": max(faster, key=lambda each: each[0]),
        "best_speedup_over_published": max(without, key=lambda each: each[0]),
        "bytes_ratio_at_1_point": max(ratios, default=None),
        "points_within_1_point": len(ratios),
    }


def _draw(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    slowness = sorted({row["slowness"] for row in rows})
    delays = sorted({row["delay_ms"] for row in rows})
    figure, axes = pyplot.subplots(
        len(slowness), len(delays), figsize=(4 * len(delays), 3 * len(slowness)), squeeze=False
    )
    for line, times in enumerate(slowness):
        for column, delay in enumerate(delays):
            some = [r for r in rows if (r["slowness"], r["delay_ms"]) == (times, delay)]
            plot = axes[line][column]
            rates = [row["rate_mbit"] for row in some]
            for name in some[0]["contenders"]:
                means = [row["contenders"][name]["mean"] for row in some]
                wide = 2.5 if name == "ours" else 1
                plot.loglog(rates, means, label=name, linewidth=wide)
            for row in some:
                ours = row["contenders"]["ours"]
                plot.annotate(ours["way"], (row["rate_mbit"], ours["mean"]), fontsize=6)
            plot.set_title(f"device {times}x slower, {delay:g} ms", fontsize=9)
            plot.set_xlabel("Mbit/s")
            plot.set_ylabel("ms per image")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
