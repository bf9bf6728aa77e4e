import json
import subprocess
import sys

from toys import ROOT


def test_the_last_line_is_json_with_the_ratios():
    command = [sys.executable, "-m", "benchmarks.inference", "--width", "4", "--rounds", "2"]
    command += ["--threads", "1", "--layout", "edgeke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])["threads_1"]
    for statistic in ("by_minima", "by_medians"):
        assert result[statistic]["full_path_over_plain_int8"] > 0
        assert result[statistic]["exit_0_speedup_over_published"] > 0
    assert "| EdgeKE int8 exit 2 |" in done.stdout
