"""Edge and cloud against its alternatives.  python -m benchmarks.partition [--bundle models]

(1) The codecs on the features of test images after every exit: bytes, error, speed; beside them
float16 and one range for the whole map (what JMDC's formula says).
(2) Real processes: the server, a proxy that is the link (benchmarks/link.py), and the device. It is
slowed by a sleep after each network and codec, so many times as long as its processor worked; or
by a CPU quota (cgroup v1; skipped where that is not writable), which stops it for up to 15 ms at a
time. At every rate, delay and slowness the mean and 95th percentile of milliseconds, bytes per
image, and accuracy, of: `local_full` (the last exit), `local` (the policy's default point), `raw`
(the picture to the server), `neurosurgeon` (the best fixed partition, f32, no exits), `jmdc` (the
best fixed partition and codec of those that degrade at most 3 % of the calibration images, no
exits), `ours`.
The last three know device, link and server by the same measurements; `ours` has a link of its own.
All take turns in an order that changes, on blocks of the same images; what is compared is the
median, over these rounds, of the ratio of two blocks' means. What takes more than twice the time
of the fastest has three rounds. The `range` of a slowdown is that of the middle half of the rounds.
Needs a bundle that was calibrated with the partitions to compare, `f32` among them.
The last line is JSON.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
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
from edgeke.device.profile import Profile
from edgeke.device.remote_rest import RemoteRest, _Way

PORT = 18_573
_CGROUP = Path("/sys/fs/cgroup/cpu")
_DEGRADATION = 0.03  # what a codec without exits may cost on calibration to be compared
_QUOTA = 1_000  # microseconds, the least that there is: of a period as many times longer


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

    def __init__(self, options: argparse.Namespace) -> None:
        bundle, precision = options.bundle, options.precision
        self.local = Classifier(bundle, precision)
        slower = options.times if options.throttle == "sleep" else 1
        slow_down(self.local, slower)
        self.local.profile(seconds=5.0)  # kept beside the model, for the others
        self.device, self.fixed = (
            Classifier(bundle, precision, server=options.server, patience_ms=60_000)
            for _ in range(2)
        )
        slow_down(self.device, slower)
        slow_down(self.fixed, slower)
        self.full = self.local.forced(len(self.local.policy.macs) - 1)
        self.chosen: dict[str, tuple[Any, Any]] = {}

    def choose(self) -> None:
        """For each contender the way and the point that it uses on the link as it is now."""
        rest, measured = self.fixed._rest, self.fixed.measured
        rest._plan(Request(), measured)
        costs = [(way, rest._costs(way, measured)[-1]) for way in rest._ways]
        local = (None, rest._pace(None) * rest._local[-1])
        codecs = {"raw": [], "neurosurgeon": [local], "jmdc": [local]}
        for way, cost in costs:
            kind, policy = way.partition.codec, way.partition.policy
            if policy.point("full").degradation > _DEGRADATION:
                continue
            if kind == RAW:
                for each in codecs.values():
                    each.append((way, cost))
            elif kind == "f32" and not way.pack:
                codecs["neurosurgeon"].append((way, cost))
            elif kind.startswith("q") and "_r" not in kind and not way.pack:
                codecs["jmdc"].append((way, cost))
        best = {name: min(ways, key=lambda each: each[1])[0] for name, ways in codecs.items()}
        self.chosen = {
            "local_full": (None, None),
            "local": (None, self.local.policy.point(self.local.policy.default)),
            **{
                name: (way, way and way.partition.policy.point("full"))
                for name, way in best.items()
            },
        }

    def run(self, name: str, image: np.ndarray) -> int:
        """Bytes sent for an image."""
        if name == "ours":
            return self.device.predict(image).sent_bytes
        way, point = self.chosen[name]
        if way is not None:
            started, rest = time.monotonic(), self.fixed._rest
            answer = rest._partly(way, point, image, Request(), self.fixed.measured, started)
            return answer.sent_bytes
        self.local.predict(image) if name == "local" else self.full(image)
        return 0

    def now(self, name: str) -> tuple[str, str]:
        """Names of the way and the point of a contender."""
        if name == "ours":
            way, point = self.device._rest._plan(Request(), self.device.measured)
        else:
            way, point = self.chosen[name]
        return "device" if way is None else way.partition.name, "" if point is None else point.name


def accuracy(
    classifier: Classifier, way: str, point: str, images: np.ndarray, labels: np.ndarray
) -> tuple[float, float]:
    """Accuracy and share of images sent, on all test images, without a network."""
    rest = object.__new__(RemoteRest)
    rest._classifier, rest.link, rest._patience = classifier, Emulated(classifier), 1e9
    rest._paces = {"": (1.0, 1.0, 0.0)}
    exits, right, sent = len(classifier.policy.macs), 0, 0
    full = classifier.forced(exits - 1)
    measured = Profile(tuple(range(1, exits + 1)), tuple(range(1, exits + 1)), 1)
    for image, label in zip(images, labels, strict=True):
        if way == "device" and not point:
            right += full(image).label == label
        elif way == "device":
            answer = classifier.run_at(image, classifier.policy.point(point))[0]
            right += int(answer.argmax()) == label
        else:
            part = next(each for each in classifier.partitions if each.name == way)
            codec = None if part.codec == RAW else parse_codec(part.codec)
            path = _Way(part, codec, False, (1.0,) * (exits + 1), 0.0)
            own = part.policy.point(point)
            reply = rest._partly(path, own, image, Request(), measured, time.monotonic())
            right += int(reply.probabilities.argmax()) == label
            sent += reply.place == "server"
    return right / len(labels), sent / len(labels)


def device_process(options: argparse.Namespace) -> None:
    """One slowness: reads links from standard input, writes rows to standard output."""
    images = channels_last(load_dataset(options.data, ("test",))["test"].images)
    print("loaded", flush=True)
    sys.stdin.readline()  # the quota is set now
    contenders, dice = Contenders(options), random.Random(0)
    for _ in sys.stdin:
        for each in (contenders.fixed, contenders.device):
            for _ in range(2):
                each._rest.link.probe()
        contenders.choose()
        # What takes the same way is measured once.
        ways = {name: contenders.now(name) for name in contenders.chosen}
        same = {name: next(k for k in ways if ways[k] == ways[name]) for name in ways}
        names = [*dict.fromkeys(same.values()), "ours"]
        for name in names:
            contenders.run(name, images[0])
        blocks: dict[str, list[float]] = {name: [] for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        sent: dict[str, list[int]] = {name: [] for name in names}
        taken: Counter[tuple[str, str]] = Counter()
        started, turn = time.perf_counter(), 0
        while turn < options.rounds and (
            turn < 3 or time.perf_counter() - started < options.seconds
        ):
            if turn == 3:  # the others are far behind
                fastest = min(np.median(each) for each in blocks.values())
                names = [n for n in names if n == "ours" or np.median(blocks[n]) < 2 * fastest]
            dice.shuffle(names)
            for name in names:
                if options.throttle == "quota":
                    time.sleep(2 * _QUOTA * options.times / 1e6)  # each starts with a whole one
                block: list[float] = []
                while len(block) < options.images and sum(block) < 300:
                    number = turn * options.images + len(block)
                    before = time.perf_counter()
                    sent[name].append(contenders.run(name, images[number % len(images)]))
                    block.append(1e3 * (time.perf_counter() - before))
                blocks[name].append(float(np.mean(block)))
                times[name] += block
            taken[contenders.now("ours")] += 1
            turn += 1
        row = {}
        same["ours"] = "ours"
        for name, one in same.items():
            way, point = taken.most_common(1)[0][0] if name == "ours" else ways[name]
            rounds = len(blocks[one])
            ratios = np.divide(blocks["ours"][:rounds], blocks[one])
            row[name] = {
                "mean": float(np.mean(times[one])),
                "median_of_blocks": float(np.median(blocks[one])),
                "p95": float(np.percentile(times[one], 95)),
                "bytes": float(np.mean(sent[one])),
                "way": way,
                "point": point,
                "ours_over": float(np.median(ratios)),
                "ours_over_middle_half": np.percentile(ratios, (25, 75)).tolist(),
            }
        row["ours"]["rounds"] = turn
        row["ours"]["ways"] = {way: count for (way, _), count in taken.items()}
        print(json.dumps(row), flush=True)


def slow_down(classifier: Classifier, times: int) -> None:
    """Have networks and codecs take so many times longer: the process sleeps after each."""

    def slower(run: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            started = time.thread_time()
            result = run(*arguments)
            ends = time.perf_counter() + (times - 1) * (time.thread_time() - started)
            while (left := ends - time.perf_counter()) > 0:
                if left > 2e-4:
                    time.sleep(left - 1e-4)
            return result

        return wrapped

    class Session:
        def __init__(self, session: Any) -> None:
            self.run, self.get_outputs = slower(session.run), session.get_outputs

    classifier._session = Session(classifier._session)
    segments = classifier.open_segments()
    segments._sessions = [Session(each) for each in segments._sessions]
    if times > 1 and not hasattr(_Way, "slower"):
        _Way.slower, _Way.message = True, slower(_Way.message)


def slowed(process: int, times: int) -> Path | None:
    """Put a process under a quota of a core; None where there is none to be had."""
    group = _CGROUP / f"edgeke-benchmark-{process}"
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text(str(_QUOTA * times))
        (group / "cpu.cfs_quota_us").write_text(str(_QUOTA))
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
    parser.add_argument("--seconds", type=float, default=10.0, help="of each point")
    parser.add_argument("--rounds", type=int, default=60, help="of each point, at most")
    parser.add_argument("--images", type=int, default=40, help="of each contender and round")
    parser.add_argument("--precision", choices=("int8", "fp32"))
    parser.add_argument("--throttle", choices=("sleep", "quota"), default="sleep")
    parser.add_argument("--pictures", help="start of the names of two SVGs")
    parser.add_argument("--rows", type=Path, help="where all numbers go, as JSON")
    parser.add_argument("--server", help=argparse.SUPPRESS)
    parser.add_argument("--times", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.server:
        device_process(options)
        return
    split = load_dataset(options.data, ("test",))["test"]
    images, classifier = channels_last(split.images), Classifier(options.bundle, options.precision)
    codecs = codec_rows(classifier, images)
    for row in codecs:
        speed = f"{row['gb_s']:6.2f} GB/s" if row["gb_s"] else ""
        print(f"after {row['after']} {row['codec']:20} {row['bytes']:9.0f} bytes "
              f"error {row['error']:.4f} {speed}", flush=True)  # fmt: skip
    command = [sys.executable, "-m", "edgeke.serving", str(options.bundle), "--log-level", "error"]
    if options.precision:
        command += ["--precision", options.precision]
    rows: list[dict[str, Any]] = []
    with Running([*command, "--port", str(PORT)], PORT), Link("127.0.0.1", PORT) as link:
        for times in options.slowness:
            rows += _measure(options, link, times)
    known: dict[Any, tuple[float, float]] = {}
    for row in rows:
        for each in row["contenders"].values():
            key = each["way"], each["point"]
            if key not in known:
                known[key] = accuracy(classifier, *key, images, split.labels)
            each["accuracy"], each["sent_share"] = known[key]
    result = _summary(rows)
    if options.rows:
        content = {"result": result, "codecs": codecs, "points": rows}
        options.rows.write_text(json.dumps(content, indent=1) + "\n")
    if options.pictures:
        _draw(rows, options.pictures)
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
    for name in ("data", "seconds", "rounds", "images", "throttle"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--times", str(times)]
    if options.precision:
        command += ["--precision", options.precision]
    pipe = subprocess.PIPE
    device = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
    device.stdout.readline()
    quota = times > 1 and options.throttle == "quota"
    group = slowed(device.pid, times) if quota else None
    if quota and group is None:
        print(f"no CPU quota here: the device {times} times slower is left out")
        device.kill()
        device.wait()
        return []
    rows = []
    device.stdin.write("\n")
    try:
        for rate in options.rates:
            for delay in options.delays:
                link.set(rate_mbit=rate, delay_ms=delay)
                device.stdin.write("\n")
                device.stdin.flush()
                line = device.stdout.readline()
                if not line:
                    raise SystemExit("the device's process ended")
                point = {"slowness": times, "rate_mbit": rate, "delay_ms": delay}
                rows.append({**point, "contenders": json.loads(line)})
                words = [
                    f"{name} {row['mean']:.2f} ms ({row['way']}, {row['ours_over']:.2f})"
                    for name, row in rows[-1]["contenders"].items()
                ]
                words.append(str(rows[-1]["contenders"]["ours"]["ways"]))
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
        every = dict(row["contenders"])
        ours, raw = every.pop("ours"), every["raw"]
        point = {key: row[key] for key in ("slowness", "rate_mbit", "delay_ms")}
        against, worst = max(every.items(), key=lambda each: each[1]["ours_over"])
        point |= {"against": against, "way": ours["way"]}
        half = [round(each - 1, 3) for each in worst["ours_over_middle_half"]]
        slower.append((worst["ours_over"] - 1, {**point, "range": half}))
        faster.append((1 / worst["ours_over"], point))
        every.pop("local")
        best = max(every.values(), key=lambda each: each["ours_over"])
        without.append((1 / best["ours_over"], point))
        if ours["way"] != "device" and ours["accuracy"] >= raw["accuracy"] - 0.01:
            ratios.append(raw["bytes"] / max(1.0, ours["bytes"]))
    return {
        "points": len(rows),
        "worst_slowdown": max(slower, key=lambda each: each[0]),
        "points_over_5_percent": sum(each > 0.05 for each, _ in slower),
        "points_over_5_percent_beyond_noise": sum(each[1]["range"][0] > 0.05 for each in slower),
        "best_speedup": max(faster, key=lambda each: each[0]),
        "best_speedup_without_local_exits": max(without, key=lambda each: each[0]),
        "bytes_ratio_at_1_point": max(ratios, default=None),
        "points_sent_within_1_point": len(ratios),
    }


def _draw(rows: list[dict[str, Any]], name: str) -> None:
    """Latency against bandwidth, and what was chosen: NAME_latency.svg and NAME_choice.svg."""
    import altair as alt

    content = [
        {
            "Mbit/s": row["rate_mbit"],
            "ms per image": each["median_of_blocks"],
            "by": contender,
            "chosen": each["way"],
            "column": f"{row['delay_ms']:g} ms each way",
            "row": f"device {row['slowness']}x slower",
            "delay, ms": row["delay_ms"],
        }
        for row in rows
        for contender, each in row["contenders"].items()
    ]
    data = alt.Data(values=content)
    columns = list(dict.fromkeys(each["column"] for each in content))
    lines = list(dict.fromkeys(each["row"] for each in content))
    facets = {
        "column": alt.Column("column:N", sort=columns, title=None),
        "row": alt.Row("row:N", sort=lines, title=None),
    }
    log = alt.Scale(type="log")
    colours = {
        "local_full": "#4c78a8", "local": "#f58518", "raw": "#e45756", "neurosurgeon": "#72b7b2",
        "jmdc": "#54a24b", "ours": "black",
    }  # fmt: skip
    latency = (
        alt.Chart(data, width=190, height=150)
        .mark_line()
        .encode(
            alt.X("Mbit/s:Q", scale=log, axis=alt.Axis(tickCount=5)),
            alt.Y("ms per image:Q", scale=log, axis=alt.Axis(tickCount=4)),
            alt.Color("by:N", scale=alt.Scale(domain=list(colours), range=list(colours.values()))),
            strokeWidth=alt.condition("datum.by == 'ours'", alt.value(3), alt.value(1)),
            **facets,
        )
    )
    latency.save(f"{name}_latency.svg")
    ours = [each for each in content if each["by"] in ("ours", "neurosurgeon", "jmdc")]
    choice = (
        alt.Chart(alt.Data(values=ours), width=240, height=90)
        .mark_rect()
        .encode(
            alt.X("Mbit/s:O"),
            alt.Y("delay, ms:O"),
            alt.Color("chosen:N", title="where the rest runs"),
            column=alt.Column("by:N", sort=["neurosurgeon", "jmdc", "ours"], title=None),
            row=facets["row"],
        )
    )
    choice.save(f"{name}_choice.svg")


if __name__ == "__main__":
    main()
