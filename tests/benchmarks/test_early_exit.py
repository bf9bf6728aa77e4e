import json
import subprocess
import sys

from toys import ROOT


def test_the_last_line_is_json_with_the_ratios():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.early_exit", "--width", "4", "--rounds", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["speedup_over_static"]) == {"exit 0", "exit 1", "exit 2", "vote"}
    assert result["exit0_speedup_over_full_path"] > 0
