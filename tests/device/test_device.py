import subprocess
import sys
from pathlib import Path

import pytest
from toys import ROOT

from edgeke.device.measure import peak_memory
from edgeke.device.session import open_session
from edgeke.errors import InputError


def test_a_missing_or_broken_model_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="missing"):
        open_session(tmp_path / "edgeke.onnx")
    (tmp_path / "edgeke.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"edgeke\.onnx is truncated or not an ONNX model"):
        open_session(tmp_path / "edgeke.onnx")


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


def test_the_device_room_needs_numpy_and_onnxruntime_only():
    code = (
        "import sys, pkgutil, importlib, edgeke.device as d\n"
        "for m in pkgutil.iter_modules(d.__path__, 'edgeke.device.'):\n"
        "    importlib.import_module(m.name)\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(done.stdout.split()) - set(sys.stdlib_module_names)
    assert {"numpy", "onnxruntime", "edgeke"} <= loaded
    assert not loaded & {
        "torch",
        "scipy",
        "onnx",
        "mlflow",
        "yaml",
        "PIL",
        "safetensors",
        "sklearn",
    }
