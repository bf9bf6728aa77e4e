import json
import subprocess
import sys

import pytest
from toys import ROOT


def last_line(*command: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_the_inference_benchmark_ends_with_the_ratios():
    options = ("--width", "4", "--rounds", "2", "--threads", "1", "--layout", "edgeke")
    result = last_line("benchmarks.inference", *options)["threads_1"]
    for statistic in ("by_minima", "by_medians"):
        assert result[statistic]["full_path_over_plain_int8"] > 0
        assert result[statistic]["exit_0_speedup_over_published"] > 0


def test_the_training_benchmark_ends_with_the_speedup():
    result = last_line("benchmarks.training", "--width", "4", "--batch", "16", "--rounds", "2")
    assert result["kd_step_speedup"] > 0
    assert result["device"] in ("cpu", "cuda")


def test_the_quantisation_benchmark_ends_with_the_milliseconds():
    times = last_line("benchmarks.quantise", "--speed", "mobilenetv3_small_050")["ms"]
    assert set(times["mobilenetv3_small_050"]) == {
        "fp32", "convolutions", "and additions", "everything", "without depthwise",
    }  # fmt: skip


@pytest.mark.slow  # spinning threads beside a busy process: minutes on two cores
def test_a_step_is_timed_beside_a_busy_process():
    result = last_line(
        "benchmarks.training", "--neighbour", "--width", "4", "--batch", "16", "--rounds", "1"
    )
    assert result["median_s"].keys() == {
        f"{threads}, {place}"
        for threads in ("spinning", "sleeping")
        for place in ("alone", "beside a neighbour")
    }


def test_js_pulls_a_quarter_as_hard_as_kl():
    result = last_line("benchmarks.gradient_scales")
    assert 0.2 < result["near_4"]["js"] < 0.3
    assert result["near_4"]["kl"] == 1
