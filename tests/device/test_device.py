import subprocess
import sys

from toys import ROOT

from edgeke.device.measure import peak_memory


def test_peak_memory_is_this_processs_own():
    code = (
        "from edgeke.device.measure import peak_memory as p; a = p(); b = bytearray(200 << 20);"
        "print(a, p())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    before, after = map(float, done.stdout.split())
    assert 150 < after - before < 260
    assert peak_memory() > 0
