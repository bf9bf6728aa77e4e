"""Runs a folder somewhere: here in a process of its own, or on a device through ssh.

Check a device before anything is trained for it, with what `evaluate.device` and
`evaluate.python` will be: python -m edgeke.remote ssh://pi@board '~/venv/bin/python'
"""

import argparse
import io
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from edgeke.errors import InputError, report

_MARK = "--- from here on edgeke's output ---"
_ECHO = f"echo {shlex.quote(_MARK)}"
_CHECK_SECONDS = 60
_RUN_SECONDS = 12 * 3600
_ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[^@:/\s-][^@:/\s]*)@)?"
    r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^@:/\s\[\]-][^@:/\s\[\]]*)(?::(?P<port>\d{1,5}))?/?"
)
_OPTIONS = {
    "BatchMode": "yes",  # a key or an agent signs in; a password is never asked for
    "ConnectTimeout": "15",
    "ServerAliveInterval": "15",  # with CountMax: a dead connection ends after a minute
    "ServerAliveCountMax": "4",
    "LogLevel": "ERROR",
}


def run_folder(folder: Path, module: str, device: str, python: str) -> None:
    """Run `python -m module` inside `folder`, where it may write below `out`.

    `device` is `local` or `ssh://user@host[:port]`. On a device the folder is copied to a temporary
    place, run with the device's own `python` (`~/` is its user's home), and its `out` copied back.
    Errors: InputError with the last words of what failed, or after twelve hours.
    """
    (folder / "out").mkdir(exist_ok=True)
    if device == "local":
        _run([sys.executable, "-m", module], "the device process", cwd=folder)
        return
    script = f"""
        folder=$(mktemp -d) || exit 1
        trap 'rm -rf "$folder"' EXIT
        trap 'exit 129' HUP INT TERM
        cd "$folder" && tar -xf - || exit 1
        {_expandable(python)} -m {module} >/dev/null || exit
        {_ECHO}
        tar -C out -cf - .
    """
    _unpack(_on_device(device, script, _packed(folder)), folder / "out")


def check_device(device: str, python: str) -> str:
    """Versions on a device, in words; nothing stays there.

    Errors: InputError when it cannot be reached, or its Python lacks what models need.
    """
    code = (
        "import platform as p, numpy as n, onnxruntime as o; "
        "print('Python', p.python_version(), 'numpy', n.__version__, 'onnxruntime', o.__version__)"
    )
    script = f"""
        {_ECHO}
        {_expandable(python)} -c {shlex.quote(code)}
    """
    return _on_device(device, script, seconds=_CHECK_SECONDS).decode().strip()


def ssh_command(device: str) -> list[str]:
    """The ssh call for `ssh://user@host[:port]`; a key or an agent signs in, never a password.

    Errors: InputError when it is no such address.
    """
    address = _ADDRESS.fullmatch(device)
    if address is None:
        raise InputError(
            f"evaluate.device = {device!r} is no device; use local or ssh://user@host:port, with a "
            "key or an agent that signs in without a password"
        )
    user, host, port = address["user"], address["host"].strip("[]"), address["port"]
    options = [word for key, value in _OPTIONS.items() for word in ("-o", f"{key}={value}")]
    return ["ssh", *options, *(["-p", port] if port else []), f"{user}@{host}" if user else host]


def _expandable(python: str) -> str:
    """Quoted for a shell, but for a leading `~/`."""
    return f"~/{shlex.quote(python[2:])}" if python.startswith("~/") else shlex.quote(python)


def _on_device(
    device: str, script: str, content: bytes = b"", seconds: float = _RUN_SECONDS
) -> bytes:
    """What a script prints after the mark; a login may print greetings before it."""
    command = [*ssh_command(device), f"sh -c {shlex.quote(script)}"]
    _, mark, output = _run(command, device, content, seconds=seconds).partition(
        f"{_MARK}\n".encode()
    )
    if not mark:
        raise InputError(f"{device} failed: its login shell does not run commands given to ssh")
    return output


def _run(
    command: list[str],
    what: str,
    content: bytes = b"",
    cwd: Path | None = None,
    seconds: float = _RUN_SECONDS,
) -> bytes:
    try:
        done = subprocess.run(
            command, input=content, capture_output=True, cwd=cwd, check=False, timeout=seconds
        )
    except FileNotFoundError as error:
        raise InputError(f"{what} failed: {error.filename} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{what} failed: no answer within {seconds:.0f} seconds") from error
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        *_, last = words.splitlines() or [f"exit status {done.returncode}"]
        if "Traceback" in words and not last.startswith("ModuleNotFoundError"):
            print(words, file=sys.stderr)  # a bug, not a mistake of the user's
        raise InputError(f"{what} failed: {last}")
    return done.stdout


def _packed(folder: Path) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, arcname=".")
    return packed.getvalue()


def _unpack(packed: bytes, folder: Path) -> None:
    """Write the files of an archive from a device below `folder`, and nowhere else."""
    try:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
    except tarfile.TarError as error:
        raise InputError(f"the device sent no archive that can be unpacked: {error}") from error


def main(arguments: Sequence[str]) -> int:
    """The command. Returns 0, or 1 with the error in one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m edgeke.remote", description=__doc__)
    parser.add_argument("device", help="ssh://user@host[:port], as evaluate.device")
    parser.add_argument("python", nargs="?", default="python3", help="as evaluate.python")
    options = parser.parse_args(arguments)
    try:
        print(f"{options.device}: {check_device(options.device, options.python)}")
    except InputError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
