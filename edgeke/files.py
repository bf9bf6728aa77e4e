"""Files written whole or not at all, read with errors that name them, and scratch space."""

import contextlib
import csv
import errno
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgeke.errors import InputError

# Where arrays that need not fit in memory are.
SCRATCH = Path(".edgeke")

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FREE_SPACE = (
    "Free space on that disk (`dvc gc --all-commits --all-experiments` removes from DVC's cache "
    "what no commit and no experiment uses) and run again"
)


def repository() -> Path:
    """The project's folder, the real one in a queued or `--temp` experiment too.

    DVC runs those in copies below `.dvc/tmp/exps` of the project. `DVC_ROOT` counts only outside
    of any project: of a pipeline that runs in a stage of another one it names the outer project.
    """
    here = Path.cwd()
    project = next((path for path in (here, *here.parents) if (path / ".dvc").is_dir()), None)
    if project is None:
        return Path(os.environ.get("DVC_ROOT") or here).resolve()
    names = project.parts
    for index in range(len(names) - 2):
        if names[index : index + 3] == (".dvc", "tmp", "exps"):
            return Path(*names[:index])
    return project


def process_number() -> int:
    """Which of the processes that train together this one is: 0 unless torchrun started it.

    Other launchers set `RANK` and `WORLD_SIZE` for their own purposes; they count only beside
    torchrun's mark.
    """
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it to `path` only if the block succeeds.

    Errors: InputError when the disk is full; an older file at `path` is untouched then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if process_number():
            return  # processes that train together have the same content: the first one writes
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        if error.errno in _FULL:
            what = f"no space left while writing {path}, which was not changed"
            raise InputError(f"{what}. {_FREE_SPACE}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write several files, none of them unless all fit on the disk."""
    with contextlib.ExitStack() as stack:
        for path, content in contents.items():
            temporary = stack.enter_context(replacing(path))
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())


def write_text(path: Path, content: str) -> None:
    """Write `content` to `path` atomically, as UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` atomically as indented JSON; refuses NaN and infinity."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows to `path` atomically as CSV, the first row's keys first; no rows, no header."""
    buffer = io.StringIO()
    names = list(rows[0]) if rows else []
    writer = csv.DictWriter(buffer, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def scratch_array(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros, mapped from a file without a name below `.edgeke`.

    The system writes it to the disk where memory is short, and removes it with the process. Errors:
    InputError when the disk is too full: a map that finds no space later kills the process.
    """
    with scratch_file(math.prod(shape) * np.dtype(dtype).itemsize) as file:  # the map keeps it open
        return np.asarray(np.memmap(file, dtype, "w+", shape=shape))


def scratch_file(size: int) -> IO[bytes]:
    """An open file of `size` bytes without a name below `.edgeke`, which goes with the process.

    Errors: InputError when the disk is too full.
    """
    SCRATCH.mkdir(parents=True, exist_ok=True)
    file = tempfile.TemporaryFile(dir=SCRATCH)  # noqa: SIM115  # the caller closes it
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        if error.errno not in _FULL:
            raise
        what = f"no space left for {size / 2**20:.0f} MiB in {SCRATCH}"
        raise InputError(f"{what}. {_FREE_SPACE}") from error
    return file


def read_json(path: Path) -> Any:
    """Read a JSON file. Errors: InputError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing; `dvc repro` builds it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not valid JSON ({error}); delete it and run `dvc repro`"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
