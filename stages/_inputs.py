"""What DVC records as a stage's inputs, so that a change while it runs is noticed.

DVC reads parameters and files when a stage ends. Without this, dvc.lock would name a value that was
edited in between for what was made with the one before.
"""

import hashlib
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from edgeke.errors import InputError
from edgeke.params import Params


def read_inputs(stage: str, params: Params) -> dict[str, str]:
    """The stage's parameters and files, each with its value; empty without a dvc.yaml.

    Of code it is the content, of larger files and of images size and time of change.
    """
    if not Path("dvc.yaml").exists():
        return {}
    described = _read(Path("dvc.yaml"))["stages"][stage]
    content = _read(Path("params.yaml"))
    values: dict[str, str] = {}
    for name in described["params"]:
        key = name.replace("${profile}", params.profile_name)
        values |= _flat(key, _at(content, key))
    for name in described["deps"]:
        path = Path(name.replace("${data.path}", params.data.path))
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix != ".pyc":
                values[str(file)] = _state(file)
    return values


def check_inputs(stage: str, params: Params, before: dict[str, str]) -> None:
    """Errors: InputError when parameters, code or data are no longer those from the start."""
    now = read_inputs(stage, params) if before else {}
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        shown = [
            key if "/" in key else f"{key} ({before.get(key)} -> {now.get(key)})"
            for key in changed[:5]
        ]
        raise InputError(
            f"{', '.join(shown)}{more} changed while {stage} ran, and DVC would record what "
            "is there now for results of what was there before. They are not recorded: run again, "
            "or put it back and run again (a training then goes on from its checkpoint)"
        )


def _read(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _flat(key: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        return {key: str(value)}
    return {k: v for name, part in value.items() for k, v in _flat(f"{key}.{name}", part).items()}


def _state(file: Path) -> str:
    if file.suffix == ".py":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    facts = file.stat()
    return f"{facts.st_size} bytes, {facts.st_mtime_ns}"
