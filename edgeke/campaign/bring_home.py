"""A campaign's results through the pipeline: checkpoints, DVC, device, summary."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from edgeke.campaign.pieces import read_network
from edgeke.campaign.published import STEP, compare_with_published
from edgeke.campaign.settings import commit, read_content
from edgeke.campaign.strips import build_dataset, cut_splits, read_strips
from edgeke.campaign.summary import HEADLINE, compared_point, model_card, summarise
from edgeke.data.dataset import load_dataset
from edgeke.device.policy import parse_policy
from edgeke.errors import InputError
from edgeke.files import read_json, write_json, write_table, write_text
from edgeke.learning.checkpoints import save_checkpoint
from edgeke.params import parse

__all__ = ["bring_home", "write_summary"]

# Step of the campaign, checkpoint, folder of results and DVC's name of the stage that makes it.
_TRAINED = (
    ("teacher", "models/teacher", "train_teacher", "train_teacher"),
    ("main", "models/branches/3", "distill/3", "distill@3"),
    ("branchynet", "models/branchynet", "train_branchynet", "train_branchynet"),
)
_LATER = ("export", "calibrate", "evaluate")
_TODAYS = (*_LATER, "tracking")  # sections that are today's, not the campaign's


def bring_home(campaign: Path, root: Path, data: Path, params: Path, out: Path) -> Path:
    """Run the CPU side in a temporary clone of `root`; returns the summary's path below `out`.

    The clone is of the last commit, its params.yaml that of the campaign; neither dvc.lock nor
    params.yaml of `root` is touched. Pretrained files come back unless the campaign was limited.
    Errors: InputError when the campaign is unfinished, the strips are others, or a stage fails.
    """
    results = read_json(campaign / "results.json")
    missing = [step for step, *_ in _TRAINED if step not in results["steps"]]
    if missing:
        raise InputError(
            f"{campaign / 'results.json'} holds no {', '.join(missing)}; run scripts/cifar100 "
            "with the same arguments until the headline is done"
        )
    with tempfile.TemporaryDirectory(prefix="edgeke-cifar100-") as name:
        clone = Path(name) / "edgeke"
        _run(root, "git", "clone", "--quiet", str(root), str(clone))
        content = _parameters(results, read_content(params, data))
        parse(content)
        (clone / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        _put_data(clone, data, results, content)
        _put_networks(clone, campaign)
        stages = ["download", *(stage for *_, stage in _TRAINED)]
        _run(clone, "dvc", "commit", "--force", *stages)
        output = _run(clone, "dvc", "repro", "evaluate")
        retrained = [stage for stage in stages if f"Running stage '{stage}'" in output]
        if retrained:
            raise InputError(
                f"dvc ran {', '.join(retrained)} again, so the networks would be others; nothing "
                "was brought back"
            )
        measured = {
            stage: read_json(clone / "results" / stage / "metrics.json") for stage in _LATER
        }
        device = read_json(clone / "results" / "evaluate" / "device.json")
        published = _published(clone, campaign, results, measured)
        summary = summarise(results, measured, device, published) | {
            "date": datetime.now(UTC).date().isoformat(),
            "commit_of_evaluation": (commit(root) or "").removesuffix("+") or None,
        }
        target = write_summary(summary, out)
        if results["settings"]["limit"] is None:
            pretrained = out / "models" / "pretrained"
            pretrained.mkdir(parents=True, exist_ok=True)
            for file in ("edgeke.int8.onnx", "policy.int8.json"):
                shutil.copy(clone / "models" / file, pretrained / file)
            write_text(pretrained / "README.md", model_card(summary))
        return target


def write_summary(summary: Mapping[str, Any], out: Path) -> Path:
    """Write `results/cifar100/summary.json` for the full profile; return what was written.

    Any other profile's numbers stand under its own name, and the headline stays empty beside them.
    """
    folder, profile = out / "results" / "cifar100", summary["profile"]
    headline = folder / "summary.json"
    target = headline if profile == "cifar100" else folder / f"{profile}.json"
    write_json(target, summary)
    if not headline.exists():
        write_json(headline, {**dict.fromkeys(HEADLINE), "measured_instead": target.name})
    return target


def _published(
    clone: Path,
    campaign: Path,
    results: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, float]],
) -> dict[str, Any] | None:
    """The paper's layout as published against our point as accurate as it; None if untrained."""
    if STEP not in results["steps"] or not (campaign / "weights" / f"{STEP}.json").exists():
        return None
    test = load_dataset(clone / "data" / "dataset.safetensors", ("test",))["test"]
    policy = parse_policy((clone / "models" / "policy.int8.json").read_text())
    bar = results["steps"][STEP]["calibration_accuracy"]
    name = (compared_point(measured, bar) or "default").removeprefix("int8/")
    model = clone / "models" / "edgeke.int8.onnx"
    point = policy.named[name]
    return compare_with_published(campaign / "weights" / STEP, test, model, point)


def _parameters(results: Mapping[str, Any], today: Mapping[str, Any]) -> dict[str, Any]:
    """The campaign's params.yaml, with the epochs that were run and what is asked of the device."""
    content: dict[str, Any] = json.loads(json.dumps(results["params"]))
    proportions = content["calibrate"]["proportions"]
    content |= {section: today[section] for section in _TODAYS}
    content["calibrate"] |= {
        "proportions": proportions,
        "requirements": _requirements(results),
    }
    recipes = content["profiles"][content["profile"]]["recipes"]
    for step, _, folder, _ in _TRAINED:
        stage = folder.split("/")[0]
        recipes[stage]["epochs"] = results["steps"][step]["epochs_run"]
    content["tracking"]["enabled"] = False
    return content


def _requirements(results: Mapping[str, Any]) -> list[dict[str, float]]:
    """A point lost, shares of the main network, and the rival's accuracy.

    That on validation: the split that certifies must not have a say in what is promised.
    """
    asked = [{"max_loss": 0.01}, *({"max_cost": share} for share in (0.3, 0.4, 0.5, 0.6, 0.75))]
    rival = results["steps"].get("plain_resnet18")
    bound = round(rival["validation"]["exits"][-1], 4) if rival else 0.0
    if 0 < bound < 1:
        asked.append({"min_accuracy": bound})
    return asked


def _put_data(
    clone: Path, data: Path, results: Mapping[str, Any], content: Mapping[str, Any]
) -> None:
    """The dataset file that the campaign trained on, from the strips."""
    source = parse(content).profile.data
    found, settings = read_strips(data / "cifar100"), results["settings"]
    dataset = build_dataset(
        found,
        cut_splits(found, source, settings["seed"]),
        clone / "data" / "dataset.safetensors",
        name=settings["profile"],
        source=source.source,
        seed=settings["seed"],
        limit=settings["limit"],
    )
    if dataset.sha256 != results["dataset_sha256"]:
        raise InputError(
            f"the strips in {data} are not those of the campaign (sha256 of the dataset differs); "
            "point --data to the ones it was trained on"
        )
    counts = {f"{name}/images": len(split.labels) for name, split in dataset.splits.items()}
    _note(clone / "results" / "download", counts)


def _put_networks(clone: Path, campaign: Path) -> None:
    for step, path, folder, _ in _TRAINED:
        network, preprocessing, described = read_network(campaign / "weights" / step)
        save_checkpoint(
            network,
            clone / path,
            preprocessing=preprocessing,
            params=described["params"],
            metrics=described["metrics"],
        )
        write_table(clone / "results" / folder / "history.csv", described["history"])
        _note(clone / "results" / folder, described["metrics"])


def _note(folder: Path, metrics: Mapping[str, float]) -> None:
    """A stage's metrics, and that no run of MLflow belongs to it."""
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "run.json", {"run_id": None, "parent_run_id": None})


def _run(folder: Path, *command: str) -> str:
    """Run a command and pass on what it prints. Errors: InputError with its last words."""
    hidden = ("DVC_", "GIT_", "MLFLOW_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    print("$", *command, flush=True)
    lines = []
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise InputError(f"`{' '.join(command)}` failed: {''.join(lines[-5:]).strip()}")
    return "".join(lines)
