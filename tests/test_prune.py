import json
import sys
from pathlib import Path

import pytest
import torch
from toys import CLASSES, SIZE, randomise, replace, with_recipe

from edgeke.errors import InputError
from edgeke.learning.channels import check_prunable, remove_channels
from edgeke.learning.checkpoints import Preprocessing, load_checkpoint, save_checkpoint
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.cost import exit_costs
from edgeke.networks.layouts import single_exit, with_layout
from edgeke.params import KD, Network, Prune
from edgeke.prune import prune, step_shares

NO_TEACHER = KD("none", 0.0, 4.0, "teacher", False)
NETWORK = Backbone("resnet10", 1, len(CLASSES), SIZE, 16)
SOME = 0.999  # of the accuracy: no step loses so much


@pytest.fixture
def main() -> BranchyNet:
    return randomise(BranchyNet(single_exit(NETWORK)))


def macs(network: BranchyNet) -> int:
    return exit_costs(network, network.architecture.backbone.image_size)[0].macs


def run(dataset, main, plan, macs=0.5, max_loss=SOME, on_epoch=lambda *_: None):
    settings, start = Prune(macs, max_loss), Network("resnet10", 16)
    return prune(dataset, main, None, NO_TEACHER, settings, plan, start=start, on_epoch=on_epoch)


def test_a_network_without_the_package(main, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-prune\.txt; or set student"):
        remove_channels(main, 1.0)


def test_steps_are_equal_and_end_at_the_share():
    assert step_shares(0.5) == pytest.approx([0.5**0.5, 0.5])
    assert step_shares(0.9) == [0.9]


pruning = pytest.importorskip("torch_pruning", reason="needs requirements-prune.txt")


@pytest.mark.parametrize(
    ("network", "width", "size"),
    [
        ("resnet10", 16, 16),
        ("timm/mobilenetv3_small_100", None, 32),
        *(
            pytest.param(f"timm/{name}", None, 64, marks=pytest.mark.slow)
            for name in ("regnety_002", "convnext_atto", "efficientnet_lite0", "ghostnet_100")
        ),
    ],
)
def test_a_checkpoint_builds_the_same_network_with_the_macs_that_are_asked_for(
    tmp_path, network, width, size
):
    whole = randomise_any(BranchyNet(single_exit(Backbone(network, 3, 5, size, width))))
    smaller = remove_channels(whole, 0.8 * macs(whole))
    assert 0.7 < macs(smaller) / macs(whole) <= 0.8
    preprocessing = Preprocessing((0.5,) * 3, (0.5,) * 3, (3, size, size), tuple("abcde"))
    save_checkpoint(smaller, tmp_path / "main", preprocessing=preprocessing, params={}, metrics={})
    read, _ = load_checkpoint(tmp_path / "main", torch.device("cpu"))
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        assert torch.equal(read(images), smaller(images))
    backbone = smaller.architecture.backbone
    several = BranchyNet(with_layout((0.3, 0.6), backbone)).eval()
    several.load_branch(2, read)
    with torch.no_grad():
        assert torch.equal(several(images)[-1], smaller(images)[0])


def randomise_any(network: BranchyNet) -> BranchyNet:
    """Norms that differ from channel to channel."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.rand(parameter.shape))
    return network.eval()


def test_the_rest_of_a_file_is_that_of_any_network(tmp_path, main):
    preprocessing = Preprocessing((0.5,), (0.5,), (1, SIZE, SIZE), CLASSES)
    save_checkpoint(main, tmp_path / "main", preprocessing=preprocessing, params={}, metrics={})
    described = json.loads((tmp_path / "main.json").read_text())
    assert "pruned" not in described["architecture"]["backbone"]
    described["architecture"]["backbone"]["pruned"] = [["layer1.0.conv1.weight", [99, 16, 3, 3]]]
    (tmp_path / "main.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="not the checkpoint its JSON describes"):
        load_checkpoint(tmp_path / "main", torch.device("cpu"))


def test_the_share_is_reached_in_steps_that_learn(dataset, main, plan):
    seen = []
    result = run(dataset, main, plan, on_epoch=lambda epoch, row: seen.append(epoch))
    assert macs(result.network) / macs(main) == result.metrics["cost/macs_share"] <= 0.5
    assert result.metrics["steps"] == 2
    assert seen == [1, 2], "the plan's epochs, at least one a step"
    shares = [row["cost/macs_share"] for row in result.rows]
    assert shares == sorted(shares, reverse=True)
    assert result.metrics["validation/accuracy"] == result.rows[-1]["validation/accuracy"]


def test_a_step_that_loses_too_much_is_not_taken(dataset, main, plan):
    main = run(dataset, main, with_recipe(plan, epochs=24), macs=0.9).network
    bad = with_recipe(plan, epochs=1, learning_rate=1e-12)  # learns nothing
    result = run(dataset, main, bad, macs=0.05, max_loss=0.02)
    assert result.metrics["cost/macs_share"] > 0.05
    assert len(result.rows) == result.metrics["steps"] + 1, "one was tried and given up"
    lost = result.metrics["validation/accuracy_before"] - result.metrics["validation/accuracy"]
    assert lost <= 0.02 + 1e-9


def test_a_killed_stage_goes_on(dataset, main, plan):
    class KilledError(Exception):
        pass

    def die(epoch: int, row: dict[str, float]) -> None:
        if epoch == 2:
            raise KilledError

    whole = run(dataset, main, plan)
    for resume in whole.resumes:
        resume.remove()
    with pytest.raises(KilledError):
        run(dataset, main, plan, on_epoch=die)
    assert [Path(resume.path).exists() for resume in whole.resumes] == [True, False]
    again = run(dataset, main, plan)
    assert again.rows == whole.rows
    one, two = whole.network.state_dict(), again.network.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(InputError, match=r"resnet10 cannot be pruned \(too few .* raise student"):
        check_prunable(NETWORK, 1e-6)
    other = replace(NETWORK, network="timm/poolformer_s12", width=None, image_size=64)
    with pytest.raises(InputError, match=r"poolformer_s12 cannot be pruned \(.*; set student\.pru"):
        check_prunable(other, 0.8)
