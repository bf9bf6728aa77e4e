import csv
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys import with_recipe
from workplaces import finish, start, wait_until, write_params

from edgeke.distill import branch_metrics, distill
from edgeke.learning.checkpoints import Preprocessing, save_checkpoint
from edgeke.learning.distances import DISTANCES
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import single_exit
from edgeke.params import KD, Network

FRESH = Network("resnet10", 4)
KL = KD("kl", 0.5, 4.0, "teacher", False)


def quiet(epoch: int, row: dict[str, float]) -> None:
    return


@pytest.fixture
def teacher(dataset) -> BranchyNet:
    torch.manual_seed(3)
    return BranchyNet(single_exit(Backbone("resnet10", 1, len(dataset.classes), 8, 4))).eval()


@pytest.mark.parametrize("distance", [*DISTANCES, "none"])
def test_every_distance_trains_every_branch_alone(dataset, architecture, plan, teacher, distance):
    rows = []
    kd = KD(distance, 0.5, 4.0, "teacher", False)
    supervisor = None if distance == "none" else teacher
    trained = distill(
        dataset,
        architecture,
        supervisor,
        kd,
        plan,
        start=FRESH,
        on_epoch=lambda _, row: rows.append(row),
    )
    for branch, one in enumerate(trained):
        assert one.network.architecture == architecture.branch(branch)
        assert len(one.history) == plan.recipe.epochs
        assert rows[plan.recipe.epochs * branch].keys() == {
            f"{split}/branch_{branch}/{what}"
            for split in ("train", "validation")
            for what in ("loss", "accuracy", "never_answered")
            if (split, what) != ("train", "never_answered")
        }
    last = trained[2].history[-1]["validation/accuracy"]
    assert branch_metrics(trained)["validation/branch_2/accuracy"] == last


def test_the_teacher_changes_the_branches_and_stays_as_it_was(dataset, architecture, plan, teacher):
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    one = with_recipe(plan, epochs=1)
    guided = distill(dataset, architecture, teacher, KL, one, start=FRESH, on_epoch=quiet)
    zero = KD("kl", 0.0, 4.0, "teacher", False)
    unguided = distill(dataset, architecture, teacher, zero, one, start=FRESH, on_epoch=quiet)
    none = KD("none", 0.5, 4.0, "teacher", False)
    alone = distill(dataset, architecture, None, none, one, start=FRESH, on_epoch=quiet)
    for branch in range(3):
        states = [runs[branch].network.state_dict() for runs in (guided, unguided, alone)]
        assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert all(torch.allclose(states[1][key], states[2][key]) for key in states[1])
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_a_kill_in_a_later_branch_keeps_the_earlier_ones(dataset, dataset_file: Path, teacher):
    root, command = dataset_file.parents[1], ("-m", "stages.distill")
    preprocessing = Preprocessing.of(dataset)
    save = {"preprocessing": preprocessing, "params": {}, "metrics": {}}
    save_checkpoint(teacher, root / "models" / "teacher", **save)
    write_params(root, epochs=8)
    finish(start(root, *command))
    whole = [load_file(root / f"models/branches/{branch}.safetensors") for branch in range(3)]
    history = (root / "results/distill/history.csv").read_text()
    rows = list(csv.DictReader(history.splitlines()))
    assert [(row["branch"], row["epoch"]) for row in rows] == [
        (str(branch), str(epoch)) for branch in range(3) for epoch in range(1, 9)
    ]
    assert not list(root.glob(".edgeke/checkpoints/*"))

    (root / "models/branches/3.json").write_text("of a layout with more exits")
    killed = start(root, *command)
    wait_until(lambda: list(root.glob(".edgeke/checkpoints/distill-2-*")), killed)
    killed.kill()
    killed.communicate()
    output = finish(start(root, *command))
    for branch in (0, 1):  # complete without a step
        assert re.search(rf"branch {branch}: 100%.* 48/48 \[00:00<\?", output), output
    again = [load_file(root / f"models/branches/{branch}.safetensors") for branch in range(3)]
    for before, after in zip(whole, again, strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert (root / "results/distill/history.csv").read_text() == history
    assert not (root / "models/branches/3.json").exists()
    assert not list(root.glob(".edgeke/checkpoints/*"))
