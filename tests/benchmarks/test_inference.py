import json
import subprocess
import sys

from toys import ROOT


def test_the_last_line_is_json_with_the_aims():
    command = [sys.executable, "-m", "benchmarks.inference", "--width", "4", "--rounds", "2"]
    command += ["--threads", "1", "--without", "torch.compile", "openvino", "earlyon"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    for key in (
        "full_path_over_same_static_fp32",
        "full_path_over_same_static_int8",
        "full_path_over_plain_fp32",
        "full_path_over_plain_int8",
        "exit0_speedup_over_published",
        "exit0_speedup_over_fastest_static",
        "call_overhead_us",
    ):
        assert result[key] > 0, key
    assert set(result["speedup_over_earlyon"]) == {"exit 0", "exit 1", "exit 2", "exit 3"}
    assert set(result["left_out"]) == {"earlyon", "openvino", "torch.compile"}
