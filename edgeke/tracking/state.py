"""What a pipeline state is: its parameters, a hash of it, its name and its tags."""

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

from edgeke.params import Params

__all__ = ["CONTENT", "PARENT", "SLOT", "STATE", "content", "flatten", "run_name", "state", "tags"]

STATE = "edgeke.state"  # tag of a parent: content and the DVC experiment's name
CONTENT = "edgeke.content"  # parameters and code: what results depend on
SLOT = "edgeke.slot"  # tag of a child: its results folder
PARENT = "mlflow.parentRunId"

_DVC = ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")


def content(params: Params) -> str:
    """A hash of what results depend on: parameters, the code in dvc.yaml, the user's own images."""
    known = {k: v for k, v in flatten(params).items() if not k.startswith("tracking.")}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    if params.profile.data.source == "image_folder":
        for file in sorted(Path(params.data.path).rglob("*")):
            facts = file.stat()
            digest.update(f"{file} {facts.st_size} {facts.st_mtime_ns}".encode())
    for file in _listed_code(Path("dvc.yaml")):
        digest.update(str(file).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def state(params: Params) -> str:
    """A hash that is the same for all stages of one pipeline state: content and experiment."""
    named = content(params) + os.environ.get("DVC_EXP_NAME", "")
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def flatten(params: Params) -> dict[str, str | int | float | bool]:
    """One flat dictionary, as MLflow shows parameters: `kd.beta`, `student.width`, ..."""
    flat: dict[str, str | int | float | bool] = {}

    def add(value: Any, key: str) -> None:
        if hasattr(value, "__dataclass_fields__"):
            for field in fields(value):
                name = "" if field.name == "profile" else field.name
                add(getattr(value, field.name), f"{key}.{name}".strip("."))
        elif value is None:
            flat[key] = "null"
        elif isinstance(value, tuple):
            flat[key] = ", ".join(map(str, value))
        else:
            flat[key] = value

    add(params, "")
    flat["profile"] = flat.pop("profile_name")
    return flat


def run_name(params: Params) -> str:
    """The parent run's name: `<profile>-<distance>-<order>-b<beta>`, and DVC's experiment's."""
    kd = params.kd
    parts = [params.profile_name, kd.distance, params.branchynet.order, f"b{kd.beta:g}"]
    return "-".join([*parts, *filter(None, [os.environ.get("DVC_EXP_NAME")])])


def tags(params: Params) -> dict[str, str]:
    """What every run of a state is tagged with: DVC's names, the commit, the machine."""
    found = {key: os.environ.get(key, "") for key in _DVC}
    found["profile"] = params.profile_name
    found[CONTENT] = content(params)
    found["edgeke.machine"] = f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores"
    commit = _git("rev-parse", "HEAD")
    if commit:
        found["mlflow.source.git.commit"] = commit
        # DVC itself changes params.yaml, dvc.lock and results/: only code says something.
        changed = _git("status", "--porcelain", "--", "edgeke", "stages", "dvc.yaml")
        found["edgeke.dirty"] = str(bool(changed)).lower()
    return {key: value for key, value in found.items() if value or key == "DVC_STAGE"}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _listed_code(dvc_yaml: Path) -> list[Path]:
    """The project's own code among the deps in dvc.yaml; none where there is no dvc.yaml."""
    import yaml

    if not dvc_yaml.is_file():
        return []
    stages = yaml.safe_load(dvc_yaml.read_text())["stages"].values()
    listed = {dep for stage in stages for dep in stage.get("do", stage).get("deps", [])}
    found: set[Path] = set()
    for path in map(Path, listed):
        if path.parts[0] in ("edgeke", "stages"):
            found |= set(path.rglob("*.py")) if path.is_dir() else {path}
    return sorted(found)
