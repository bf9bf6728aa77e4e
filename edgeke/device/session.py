"""ONNX Runtime sessions as every part of EdgeKE opens them."""

import os
import re
import threading
from pathlib import Path

import onnxruntime

from edgeke.device.onnx_file import check_content, check_file, damage
from edgeke.errors import InputError

# No process is forked while a session is being opened: its child would wait for ONNX Runtime's
# locks for ever.
_opening = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_opening.release
    )

# Parts of ONNX Runtime's messages, and what they mean.
_CAUSES = {
    r"Unsupported model IR version|is under development|only \*guarantees\* support": (
        "is of a newer format than ONNX Runtime {version} reads; install a newer one"
    ),
    r"NOT_IMPLEMENTED|No Op registered|is not a registered function": (
        "has an operator that ONNX Runtime {version} lacks; install a newer one"
    ),
    r"bad_alloc|Failed to allocate|MemoryError": (
        "does not fit into this device's memory; use int8, or a smaller model"
    ),
}


def open_session(
    model: Path | bytes, threads: int = 1, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """A CPU session on `threads` threads (0: all cores) that do not spin while idle.

    Spinning pools of several sessions starve each other. With `profile`, how its file's name
    begins, ONNX Runtime's profiler is on. No data is read from outside the model. Errors:
    InputError naming the cause when the file cannot be read or run.
    """
    name = "the model"
    if isinstance(model, Path):
        name = str(model)
        check_file(model)
    else:
        check_content(model, name)
    options = onnxruntime.SessionOptions()
    if threads == 0 and cores() < (os.cpu_count() or 1):
        threads = cores()  # ONNX Runtime would count those that this process may not use
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        with _opening:
            return onnxruntime.InferenceSession(
                str(model) if isinstance(model, Path) else model,
                options,
                providers=["CPUExecutionProvider"],
            )
    except Exception as error:  # ONNX Runtime raises classes of its own, below Exception
        reason = " ".join(str(error).split())
        raise InputError(f"{name} {_cause(model, error)} ({reason})") from error


def cores() -> int:
    """How many cores this process may use: fewer than there are in a container, or by taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cause(model: Path | bytes, error: Exception) -> str:
    for pattern, words in _CAUSES.items():
        if re.search(pattern, f"{type(error).__name__}: {error}"):
            return words.format(version=onnxruntime.__version__)
    return damage(model if isinstance(model, bytes) else model.read_bytes())
