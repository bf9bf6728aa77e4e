import json
import math
import os
import stat
from functools import partial
from pathlib import Path

import pytest
from toys import replace

from edgeke.device import profile as module
from edgeke.device import timing
from edgeke.device.classifier import Classifier
from edgeke.device.profile import (
    Profile,
    conditions,
    measure_costs,
    read_profile,
    write_profile,
)
from edgeke.device.timing import summary, time_interleaved

HERE = conditions(Path("edgeke.onnx"), (10, 20), 1)
PROFILE = Profile((1.0, 2.0), (1.5, 2.5), 20)


def test_a_real_profile_increases_and_is_kept(bundle, images):
    classifier = Classifier(bundle)
    measured = classifier.profile(rounds=30)
    assert measured == classifier.measured
    for values in (measured.median_ms, measured.p95_ms):
        assert 0 < values[0] < values[1] < values[2]
    assert all(
        p95 >= median for median, p95 in zip(measured.median_ms, measured.p95_ms, strict=True)
    )
    assert measured.rounds == 30
    assert Classifier(bundle).measured == measured
    assert Classifier(bundle / "edgeke.onnx").measured == measured, "the same file"
    assert Classifier(bundle, threads=2).measured is None, "other threads"
    assert classifier.predict(images[0], mean_latency_ms=1e4).point.name
    assert [path.name for path in bundle.iterdir() if path.name.startswith(".")] == []


def test_several_conditions_share_a_file(tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    assert read_profile(path, HERE, 2) is None
    assert write_profile(path, HERE, PROFILE)
    others = [
        conditions(Path("edgeke.int8.onnx"), (10, 20), 1),
        conditions(Path("edgeke.onnx"), (10, 21), 1),
        conditions(Path("edgeke.onnx"), (10, 20), 2),
    ]
    monkeypatch.setattr(module.onnxruntime, "__version__", "1.15.1")
    others.append(conditions(Path("edgeke.onnx"), (10, 20), 1))
    monkeypatch.undo()
    monkeypatch.setattr(module, "processor", lambda: "another board")
    others.append(conditions(Path("edgeke.onnx"), (10, 20), 1))
    for other in others:
        assert read_profile(path, other, 2) is None, other
        write_profile(path, other, replace(PROFILE, rounds=7))
    assert read_profile(path, HERE, 2) == PROFILE
    write_profile(path, HERE, replace(PROFILE, rounds=99))
    assert read_profile(path, HERE, 2).rounds == 99
    assert len(json.loads(path.read_text())) == 1 + len(others)
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444


CORE = """processor\t: {n}
BogoMIPS\t: 108.00
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: {variant}
CPU part\t: {part}
CPU revision\t: 4

"""


def test_boards_whose_processor_has_no_name_are_told_apart(tmp_path, monkeypatch):
    """Kernels of 64-bit ARM write no `model name`, and only a Raspberry Pi writes `Model`."""
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    monkeypatch.setattr(module.platform, "processor", lambda: "")
    assert "unknown processor of" in module.processor()

    def board(part="0xd03", variant="0x0", name="", khz=1800000, kib=3884376):
        files = {
            "proc/cpuinfo": CORE.format(n=0, part=part, variant=variant) * 2,
            "proc/device-tree/model": f"{name}\0" if name else "",
            "proc/meminfo": f"MemTotal:        {kib} kB\nMemFree:  1 kB\n",
            "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": f"{khz}\n",
        }
        for place, text in files.items():
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place).write_text(text)
        return conditions(Path("edgeke.onnx"), (10, 20), 1)

    boards = [
        board(), board(part="0xd0b"), board(variant="0x3"), board(name="Radxa ROCK 5B"),
        board(khz=2400000), board(kib=7_800_000),
    ]  # fmt: skip
    assert len(set(boards)) == len(boards)
    assert board(kib=3_790_112) == boards[0], "another kernel keeps another part of the memory"
    assert board(name="Radxa ROCK 5B").endswith("0x41/0xd03/0x0/4, Radxa ROCK 5B, 1800 MHz, 4 GiB")


def test_a_profile_elsewhere_is_not_read(tmp_path):
    write_profile(tmp_path / "profile.json", HERE, PROFILE)
    (tmp_path / "bundle").mkdir()
    link = tmp_path / "bundle" / "profile.json"
    link.symlink_to(tmp_path / "profile.json")
    with pytest.warns(UserWarning, match="leads out of its folder and is not used"):
        assert read_profile(link, HERE, 2) is None


@pytest.mark.filterwarnings("ignore:.*cannot be read and is not used")
@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 1, "profiles": []}', 100_000 * "["])
def test_another_file_counts_as_absent(tmp_path, text):
    (tmp_path / "profile.json").write_text(text)
    assert read_profile(tmp_path / "profile.json", HERE, 2) is None


def test_a_damaged_file_is_named_and_replaced(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text('{"edgeke')
    with pytest.warns(UserWarning, match=r"profile\.json cannot be read and is not used"):
        assert read_profile(path, HERE, 2) is None
    with pytest.warns(UserWarning, match="cannot be read"):
        write_profile(path, HERE, PROFILE)
    assert read_profile(path, HERE, 2) == PROFILE


@pytest.mark.parametrize(
    "change", [{"median_ms": [1.0]}, {"median_ms": None}, {"rounds": None}, {"p95_ms": "ab"},
               {"median_ms": [2.0, 1.0]}, {"p95_ms": [1.5, "x"]}, {"p95_ms": [1, 10**400]},
               {"median_ms": [1.0, float("inf")]}]
)  # fmt: skip
def test_a_senseless_entry_is_not_used(tmp_path, change):
    path = tmp_path / "profile.json"
    write_profile(path, HERE, PROFILE)
    content = json.loads(path.read_text())
    content[HERE] |= change
    path.write_text(json.dumps(content))
    assert read_profile(path, HERE, 2) is None


def test_a_folder_that_cannot_be_written_keeps_costs_in_memory(bundle, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    classifier = Classifier(bundle)
    write_profile(bundle / "profile.json", HERE, PROFILE)
    before = sorted(bundle.rglob("*"))
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(UserWarning, match=r"kept in memory alone.*No space left"):
        measured = classifier.profile(rounds=1)
    assert classifier.measured == measured
    assert read_profile(bundle / "profile.json", HERE, 2) == PROFILE
    assert sorted(bundle.rglob("*")) == before


def test_noise_that_turns_the_order_is_evened_out(monkeypatch):
    taken = {"0": [3.0] * 20, "1": [2.0] * 20, "2": [5.0] * 20, "3": [5.0] * 20}
    monkeypatch.setattr(module, "time_interleaved", lambda *arguments: taken)
    measured = measure_costs(lambda exit: None, 4, 20, 5.0)
    assert measured.median_ms == pytest.approx((3.0, 3.003, 5.0, 5.005))
    assert measured.p95_ms == measured.median_ms


def test_calls_run_equally_often_and_no_longer_than_allowed(monkeypatch):
    """At a second an image, three exits take 6 seconds and not 130."""
    now, ran = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def run(seconds: float) -> None:
        ran.append(seconds)
        now[0] += seconds

    for scale, fewest, most in ((1.0, 1, 6.4), (0.1, 9, 5.0), (1e-4, 30, 5.0), (60.0, 1, 379.0)):
        now[0], calls = 0.0, {str(s): partial(run, s * scale) for s in (0.4, 0.7, 1.0)}
        milliseconds = time_interleaved(calls, 30, 5.0)
        assert now[0] <= most
        assert {len(values) for values in milliseconds.values()} == {fewest} or scale == 0.1
        assert len(milliseconds["0.4"]) >= fewest
    assert ran[-9:].count(24.0) == 3, "one round to warm up, one that is measured"


def test_summary_by_hand():
    assert summary([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "p95": pytest.approx(2.9)}


def test_every_timed_call_follows_one_of_the_same():
    done: list[str] = []
    calls = {name: lambda name=name: done.append(name) for name in "abc"}
    taken = time_interleaved(calls, 20, math.inf)
    timed = done[-2 * 3 * 20 :]
    assert timed[::2] == timed[1::2]
    assert {name: len(values) for name, values in taken.items()} == dict.fromkeys("abc", 20)
