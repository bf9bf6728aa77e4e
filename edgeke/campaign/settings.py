"""What a campaign was asked for, as the content of a params.yaml; prepared for bare machines."""

import copy
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeke.campaign.strips import cut_splits, read_strips
from edgeke.errors import InputError
from edgeke.files import read_json, write_json
from edgeke.params import Params, load, parse

__all__ = ["PREPARED", "Settings", "campaign_content", "commit", "prepare", "read_content"]

PREPARED = "cifar100.json"
_HALVES = 2  # of the strips: 47 MB each, what one call to an accelerator machine carries


@dataclass(frozen=True)
class Settings:
    """What changes the results: a campaign goes on only with the same.

    `width`, `precision` None: the profile's. `limit`: images per split, for rehearsals. `epochs`:
    no schedule is longer.
    """

    profile: str
    seed: int
    width: int | None
    limit: int | None
    epochs: int | None
    precision: str | None
    compile: bool


def read_content(params: Path, data: Path) -> dict[str, Any]:
    """params.yaml as plain values; where PyYAML is missing, those that `prepare` wrote into `data`.

    Errors: InputError when neither can be read.
    """
    try:
        import yaml
    except ModuleNotFoundError:
        content: dict[str, Any] = read_json(_prepared(data))["params"]
        return content
    load(params)  # errors in the words of the pipeline
    content = yaml.safe_load(params.read_text())
    return content


def campaign_content(content: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], Params]:
    """The parameters of the headline run, as content of a params.yaml and parsed.

    Layout `stages`, order `mixed`, the exits taught by the teacher and the main exit.
    Errors: InputError when the profile is unknown or not CIFAR-100.
    """
    content = copy.deepcopy(content)
    if settings.profile not in content["profiles"]:
        known = ", ".join(content["profiles"])
        raise InputError(f"--profile {settings.profile} does not exist; use one of {known}")
    block = content["profiles"][settings.profile]
    if block["data"]["source"] != "cifar100":
        raise InputError(
            f"--profile {settings.profile} reads {block['data']['source']}; use a profile whose "
            "source is cifar100"
        )
    content |= {"profile": settings.profile, "seed": settings.seed}
    content["profiles"] = {settings.profile: block}
    if settings.width is not None:
        block["teacher"]["width"] = block["student"]["width"] = settings.width
    content["kd"]["source"] = "both"
    content["distill"]["branches"] = [3]
    # The main exit teaches the others and answers what they leave, so it weighs most.
    content["branchynet"] = {"layout": "stages", "order": "mixed", "weights": [0.2, 0.2, 0.2, 0.4]}
    content["calibrate"]["proportions"] = [0.3, 0.3, 0.3, 0.9]
    content["training"]["compile"] = settings.compile
    if settings.precision is not None:
        content["training"]["precision"] = settings.precision
    return content, parse(content)


def prepare(params: Path, data: Path, settings: Settings, folder: Path) -> list[Path]:
    """Write what a bare machine needs: `half<i>/cifar100/` with the strips and the parameters.

    Each half travels in one call; there, `cp -r half<i>/cifar100 DATA` twice makes `--data DATA`.
    The parameters come with the splits, which need scikit-learn, and this commit.
    """
    content = read_content(params, data)
    _, parsed = campaign_content(content, settings)
    strips = data / "cifar100"
    found = read_strips(strips)
    splits = cut_splits(found, parsed.profile.data, settings.seed)
    held = {
        "params": content,
        "splits": {name: indices.tolist() for name, indices in splits.items()},
        "seed": settings.seed,
        "commit": commit(params.resolve().parent),
        "settings": asdict(settings),
    }
    halves = [folder / f"half{number}" for number in range(_HALVES)]
    for number, half in enumerate(halves):
        for part in ("train", "test"):
            target = half / "cifar100" / part
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted((strips / part).glob("*.webp"))[number::_HALVES]:
                shutil.copy(file, target / file.name)
        write_json(_prepared(half), held)
    return halves


def commit(root: Path) -> str | None:
    """The git commit of the tree, None where there is no git; `+` behind it: with changes."""
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()


def _prepared(data: Path) -> Path:
    return data / "cifar100" / PREPARED
