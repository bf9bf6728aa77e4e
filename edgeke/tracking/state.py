"""What MLflow must know about a stage's execution: the pipeline's state, its name and its tags."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from edgeke.files import repository
from edgeke.params import Params

PARENT = "mlflow.parentRunId"
# Variables that say which repository git reads.
_GIT = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")
PROCESS = "edgeke.process"  # tag of a child: host and number of the process that executed it


@dataclass
class Record:
    """One execution of a stage, kept as `results/<stage>/run.json`: enough to log it later.

    `state` is a hash of the content, the DVC experiment's name, the machine and the repository, as
    each measures for itself; `name`, `params` and `tags` are those of its parent run, to which the
    last stage adds `headline` and `model`, the SHA-256 of the file to register.
    Times are milliseconds since 1970.
    """

    id: str
    stage: str
    experiment: str
    state: str
    name: str
    params: dict[str, str]
    tags: dict[str, str]
    started: int
    ended: int = 0
    headline: dict[str, float] = field(default_factory=dict)
    model: str | None = None

    @classmethod
    def start(cls, stage: str, params: Params) -> "Record":
        """The record of a stage that starts now."""
        kd, digest = params.kd, content(params)
        experiment = os.environ.get("DVC_EXP_NAME", "")
        name = f"{params.profile_name}-{kd.distance}-{params.branchynet.order}-b{kd.beta:g}"
        return cls(
            id=uuid.uuid4().hex,
            stage=stage,
            experiment=params.tracking.experiment,
            state=hashlib.sha256(
                f"{digest}{experiment}{platform.node()}{repository()}".encode()
            ).hexdigest()[:16],
            name=f"{name}-{experiment}" if experiment else name,
            params=flatten(params),
            tags=_tags(params, digest),
            started=int(time.time() * 1000),
        )


def content(params: Params) -> str:
    """A hash of what results depend on: parameters, code, the user's own images."""
    values = {k: v for k, v in flatten(params).items() if not k.startswith("tracking.")}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    if params.profile.data.source in ("image_folder", "csv"):
        for file in sorted(Path(params.data.path).rglob("*")):
            facts = file.stat() if file.exists() else file.lstat()  # a link to nothing
            text = f"{file} {facts.st_size} {facts.st_mtime_ns}"
            digest.update(text.encode(errors="surrogateescape"))  # names that are not UTF-8
    for file in sorted([*Path("edgeke").rglob("*.py"), *Path("stages").rglob("*.py")]):
        digest.update(str(file).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def flatten(params: Params) -> dict[str, str]:
    """One flat dictionary, as MLflow shows parameters: `kd.beta`, `student.width`, ..."""
    flat: dict[str, str] = {}

    def add(value: Any, key: str) -> None:
        if is_dataclass(value):
            for field in fields(value):
                name = "" if field.name == "profile" else field.name
                add(getattr(value, field.name), f"{key}.{name}".strip("."))
        elif isinstance(value, tuple):
            flat[key] = ", ".join(map(str, value))
        else:
            flat[key] = "null" if value is None else str(value)

    add(params, "")
    flat["profile"] = flat.pop("profile_name")
    return flat


def _tags(params: Params, digest: str) -> dict[str, str]:
    """What the runs of a state are tagged with: DVC's names, the commit, the machine."""
    names = ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")
    tags = {name: os.environ[name] for name in names if os.environ.get(name)}
    tags["profile"] = params.profile_name
    tags["edgeke.content"] = digest
    tags["edgeke.machine"] = f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores"
    tags[PROCESS] = f"{platform.node()} {os.getpid()}"
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        # DVC itself changes params.yaml, dvc.lock and results/, so only code counts.
        changed = _git("status", "--porcelain", "--", "edgeke", "stages", "dvc.yaml")
        tags["edgeke.dirty"] = str(bool(changed)).lower()
    return tags


def _git(*arguments: str) -> str:
    """What git answers about the working folder; empty without git or a repository.

    Whatever else git refuses (a repository of another user) is said. Variables that name another
    repository are left out, as a hook sets them.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _GIT}
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    if done.returncode and "not a git repository" not in done.stderr and done.stderr.strip():
        cause = done.stderr.strip().splitlines()[0].removeprefix("fatal: ")
        print(
            f"warning: runs are logged without their commit, since git refuses: {cause}. A "
            f"repository of another user: git config --global --add safe.directory {Path.cwd()}",
            file=sys.stderr,
        )
    return done.stdout.strip()
