"""ONNX Runtime sessions as every part of EdgeKE opens them."""

from pathlib import Path

import onnxruntime

from edgeke.errors import InputError


def open_session(
    model: Path | bytes, threads: int = 1, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """A CPU session on `threads` threads that does not spin while idle.

    Spinning pools of several sessions starve each other. With `profile`, how its file's name
    begins, ONNX Runtime's profiler is on. Errors: InputError when the file is missing or not a
    whole ONNX model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    name = str(model) if isinstance(model, Path) else "the model"
    if isinstance(model, Path) and not model.is_file():
        raise InputError(f"{model} is missing; copy the model to the device")
    try:
        return onnxruntime.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:  # ONNX Runtime raises classes of its own, below Exception
        raise InputError(
            f"{name} is truncated or not an ONNX model ({error}); copy or export it again"
        ) from error
