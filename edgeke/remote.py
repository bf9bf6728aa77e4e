"""Runs a folder somewhere: here in a process of its own, or on a device through ssh."""

import io
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.parse import urlsplit

from edgeke.errors import InputError

__all__ = ["run_folder", "ssh_command"]

_CONNECT_SECONDS = 15


def run_folder(folder: Path, module: str, arguments: list[str], device: str, python: str) -> None:
    """Run `python -m module arguments` inside `folder`, where it may write below `out`.

    `device` is `local` or `ssh://user@host[:port]`: then the folder is copied there, run with the
    device's own `python`, and its `out` brought back. Errors: InputError with the words of what
    failed.
    """
    (folder / "out").mkdir(exist_ok=True)
    if device == "local":
        command = [sys.executable, "-m", module, *arguments]
        _checked("the device process", command, cwd=folder)
        return
    ssh = ssh_command(device)
    made = _checked(f"{device}", [*ssh, "mktemp -d"])
    there = made.decode().strip()
    quoted = shlex.quote(there)
    try:
        _checked(f"copying to {device}", [*ssh, f"tar -C {quoted} -xf -"], _packed(folder))
        run = shlex.join([python, "-m", module, *arguments])
        _checked(f"the process on {device}", [*ssh, f"cd {quoted} && {run}"])
        packed = _checked(f"copying from {device}", [*ssh, f"tar -C {quoted}/out -cf - ."])
        _unpack(packed, folder / "out")
    finally:
        subprocess.run([*ssh, f"rm -rf {quoted}"], capture_output=True, check=False)


def ssh_command(device: str) -> list[str]:
    """The ssh call for `ssh://user@host[:port]`; a key or an agent signs in, never a password.

    Errors: InputError when it is no such address.
    """
    try:
        address = urlsplit(device)
        host, port = address.hostname, address.port
    except ValueError:
        host, port = None, None
    else:
        if address.scheme != "ssh" or address.password or address.path.strip("/"):
            host = None
    if not host or host.startswith("-") or (address.username or "").startswith("-"):
        raise InputError(
            f"evaluate.device = {device!r} is no device; use local or ssh://user@host:port, with a "
            "key or an agent that signs in without a password"
        )
    target = f"{address.username}@{host}" if address.username else host
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]
    return ["ssh", *options, *(["-p", str(port)] if port else []), target]


def _checked(
    what: str, command: list[str], given: bytes | None = None, cwd: Path | None = None
) -> bytes:
    try:
        done = subprocess.run(command, input=given, capture_output=True, cwd=cwd, check=False)
    except FileNotFoundError as error:
        raise InputError(f"{what} cannot start: {error.filename} is not installed") from error
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        raise InputError(f"{what} failed: {words}")
    return done.stdout


def _packed(folder: Path) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, arcname=".")
    return packed.getvalue()


def _unpack(packed: bytes, folder: Path) -> None:
    """Write the plain files of an archive from a device below `folder`, and nowhere else."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            target = (folder / member.name).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise InputError(f"the device sent a file outside its folder: {member.name!r}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())
