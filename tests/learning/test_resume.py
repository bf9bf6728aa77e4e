"""A training that is killed goes on to the weights it would have had."""

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toys import ROOT, with_recipe
from workplaces import finish, start, wait_until, write_params

from edgeke.learning.fit import fit
from edgeke.learning.images import Images
from edgeke.learning.objectives import CrossEntropy
from edgeke.learning.resume import ResumeFile, code_hash, fingerprint
from edgeke.learning.trained import Trained
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import single_exit


def test_another_parameter_is_another_file(plan, monkeypatch):
    one = ResumeFile("distill/0", plan=plan)
    assert one.path != ResumeFile("distill/0", plan=with_recipe(plan, learning_rate=0.04)).path
    assert one.path != ResumeFile("distill/1", plan=plan).path
    assert one.path == ResumeFile("distill/0", plan=with_recipe(plan)).path
    monkeypatch.setattr("edgeke.learning.resume.code_hash", lambda: "other code")
    assert one.path != ResumeFile("distill/0", plan=plan).path


def test_code_that_weights_depend_on_changes_the_key(tmp_path: Path):
    package = tmp_path / "edgeke"
    shutil.copytree(ROOT / "edgeke", package, ignore=shutil.ignore_patterns("__pycache__"))
    hashes = [code_hash(ROOT / "edgeke"), code_hash.__wrapped__(package)]
    for name in ("device/scores.py", "learning/schedules.py", "networks/heads.py", "distill.py"):
        with (package / name).open("a") as file:
            file.write("CHANGED = True\n")
        hashes.append(code_hash.__wrapped__(package))
    assert hashes[0] == hashes[1] == hashes[2]
    assert len(set(hashes)) == 4


def train(dataset, plan, slot: str, die_at: int | None = None) -> Trained | None:
    class KilledError(Exception):
        pass

    def on_epoch(epoch: int, row: dict[str, float]) -> None:
        if epoch == die_at:
            raise KilledError

    torch.manual_seed(plan.seed)
    network, resume = (
        BranchyNet(single_exit(Backbone("resnet10", 1, 3, 8, 4))),
        ResumeFile(slot, plan=plan),
    )
    images = Images.of(dataset, torch.device("cpu"))
    with contextlib.suppress(KilledError):
        options = {"description": "toy", "on_epoch": on_epoch, "resume": resume}
        history = fit(network, CrossEntropy(), images, plan, **options)
        return Trained(network, history, (resume,), len(history))
    return None


@pytest.mark.parametrize(
    "changes", [{}, {"ema": 0.9, "optimiser": "adamw"}, {"patience": 3}], ids=str
)
def test_a_training_stopped_between_epochs_goes_on_alike(dataset, plan, changes):
    plan = with_recipe(plan, epochs=4, **changes)
    whole = train(dataset, plan, "whole")
    train(dataset, plan, "parts", die_at=3)
    assert ResumeFile("parts", plan=plan).load()[0].epoch == 2
    parts = train(dataset, plan, "parts")
    assert parts.history == whole.history
    assert fingerprint(parts.network) == fingerprint(whole.network)
    parts.remove_checkpoints()
    assert ResumeFile("parts", plan=plan).load() is None


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def rename_a_tensor(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"root.backbone.", b"root.b_ckbone."))


@pytest.mark.parametrize(
    ("change", "reason"),
    [(damage, "it is damaged"), (rename_a_tensor, "its tensors are not this network's")],
)
def test_an_unusable_checkpoint_is_ignored_with_one_line(dataset, plan, capsys, change, reason):
    plan = with_recipe(plan, epochs=3)
    whole = train(dataset, plan, "whole")
    train(dataset, plan, "parts", die_at=3)
    path = ResumeFile("parts", plan=plan).path
    change(path)
    capsys.readouterr()
    parts = train(dataset, plan, "parts")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "ignored" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: {path} is ignored: {reason}")
    assert warnings[0].endswith("parts starts again")
    assert fingerprint(parts.network) == fingerprint(whole.network)


def test_what_a_killed_writer_left_goes_with_the_checkpoint(dataset, plan):
    train(dataset, with_recipe(plan, epochs=3), "parts", die_at=3)
    resume = ResumeFile("parts", plan=with_recipe(plan, epochs=3))
    left, young = (resume.path.with_name(f".{resume.path.name}.{end}.tmp") for end in "ab")
    for path in (left, young):
        path.touch()
    os.utime(left, (0, 0))
    resume.remove()
    assert list(resume.path.parent.iterdir()) == [young]  # somebody may be writing it


def test_an_experiments_copy_keeps_its_checkpoints_in_the_repository(tmp_path, plan, monkeypatch):
    """DVC deletes the copy, also when the run in it is stopped."""
    copy = tmp_path / "project" / ".dvc" / "tmp" / "exps" / "tmpx" / "below"
    (copy / ".dvc").mkdir(parents=True)
    monkeypatch.setattr("edgeke.learning.resume.FOLDER", Path(".edgeke/checkpoints"))
    monkeypatch.chdir(copy)
    folder = tmp_path / "project" / ".edgeke" / "checkpoints"
    assert ResumeFile("distill/0", plan=plan).path.parent == folder


def test_a_killed_stage_goes_on_to_bit_identical_weights(dataset_file: Path):
    root, command = dataset_file.parents[1], ("-m", "stages.train_teacher")
    write_params(root, epochs=150)
    content = yaml.safe_load((root / "params.yaml").read_text())
    content["augmentation"] |= {"mixup": 0.2, "cutout": 3}
    content["optimisation"]["ema"] = 0.9
    (root / "params.yaml").write_text(yaml.safe_dump(content))

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in root.glob(".edgeke/checkpoints/*.safe*")}

    def results() -> tuple[dict[str, torch.Tensor], str]:
        assert not list(root.glob(".edgeke/checkpoints/*"))
        history = (root / "results" / "train_teacher" / "history.csv").read_text()
        return load_file(root / "models" / "teacher.safetensors"), history

    finish(start(root, *command))
    weights, history = results()
    (root / "models" / "teacher.safetensors").unlink()

    killed = start(root, *command)
    wait_until(state, killed)
    time.sleep(random.uniform(0, 0.3))  # at a random moment
    killed.kill()
    killed.communicate()
    assert not (root / "models" / "teacher.safetensors").exists()

    before = state()
    stopped = start(root, *command)
    wait_until(lambda: state() != before, stopped)
    stopped.send_signal(signal.SIGTERM)
    output = finish(stopped, status=130)
    assert "stopped: teacher was told to stop; the same command goes on" in output
    assert "Traceback" not in output

    finish(start(root, *command))
    weights_again, history_again = results()
    assert weights.keys() == weights_again.keys()
    assert all(torch.equal(weights[key], weights_again[key]) for key in weights)
    assert history_again == history
