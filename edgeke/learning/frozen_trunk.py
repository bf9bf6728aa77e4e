"""Exits on a frozen trunk: their features of each image are computed once, and they learn on them.

The fit loop, objectives and checkpoints are the same as for images. A row takes an image's place:
`[D, 1, 1]`, the features of every exit and the teacher's logits one after the other.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from edgeke.data.augment import Augment, Normalise
from edgeke.files import scratch_array
from edgeke.learning.frozen import Frozen
from edgeke.learning.images import Images, at_once, resident
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import Augmentation, Plan

_BATCH = 100


class Features:
    """The features of all images that reach the exits of a network, its trunk as it is now.

    Up to an exit's first layer that learns: after the pooling, where an exit begins with it. Each
    training image has `augmentation.copies` rows, augmented with the plan's seed, and an epoch
    goes over all of them. Rows are mapped from a file without a name below `.edgeke`, which the
    system removes with the process.

    `images`, `plan` and `teacher` are given to the fit loop and the objective in place of the
    originals.
    """

    images: Images
    plan: Plan
    teacher: "Answers | None"

    def __init__(
        self, network: BranchyNet, images: Images, plan: Plan, teacher: BranchyNet | None
    ) -> None:
        device, batch_size = images.device, at_once(images.train, _BATCH)
        trunk = _Trunk(network)
        self._trunk = Frozen(trunk).to(device)
        self._columns: list[slice] = []
        self._shapes: list[torch.Size] = []
        with torch.no_grad():
            parts = trunk.parts(images.normalise(images.train[:1]))
        for features in parts:
            start = self._columns[-1].stop if self._columns else 0
            self._columns.append(slice(start, start + features[0].numel()))
            self._shapes.append(features.shape[1:])
        self._width = self._columns[-1].stop
        self.teacher = self._guide = None
        # With the same trunk the teacher answers from the same features: one pass for both.
        self._from_features = teacher is not None and _same_trunk(network, teacher)
        if teacher:
            last = {len(parts) - 1: teacher.exits[-1]}
            self._guide = Frozen(self.view(last) if self._from_features else teacher)
            answers = slice(self._width, self._width + len(images.classes))
            self._width += len(images.classes)
            self.teacher = Answers(answers, teacher.class_vectors())

        settings = plan.augmentation
        copies = settings.copies if _is_random(settings) else 1
        augment = Augment(settings, len(images.classes), images.normalise.mean)
        generator = torch.Generator().manual_seed(plan.seed)

        def augmented() -> Iterator[Tensor]:
            for _ in range(copies):
                every_label = torch.split(images.train_labels, batch_size)
                every_batch = torch.split(images.train, batch_size)
                for batch, labels in zip(every_batch, every_label, strict=True):
                    yield augment(batch.to(device), labels, generator)[0]

        self.images = Images(
            self._rows(augmented(), copies * len(images.train), images.normalise, device),
            images.train_labels.repeat(copies),
            self._rows(
                iter(torch.split(images.validation, batch_size)),
                len(images.validation),
                images.normalise,
                device,
            ),
            images.validation_labels,
            images.classes,
            _Unchanged(device),
        )
        nothing = Augmentation(
            crop_padding=0,
            flip=False,
            cutout=0,
            mixup=0.0,
            cutmix=0.0,
            trivial_augment=False,
            copies=1,
        )
        self.plan = dataclasses.replace(plan, augmentation=nothing)

    def view(self, exits: Mapping[int, nn.Module]) -> nn.Module:
        """Exits by number as a network from rows `[N, D, 1, 1]` to logits `[E, N, K]`.

        It shares their modules: training it trains them.
        """
        places = [(self._columns[number], self._shapes[number]) for number in exits]
        return _Heads(places, [_split(exit)[1] for exit in exits.values()])

    def _rows(
        self, batches: Iterator[Tensor], count: int, normalise: Normalise, device: torch.device
    ) -> Tensor:
        rows = torch.from_numpy(scratch_array((count, self._width), np.float32))
        start = 0
        with tqdm(desc="features", total=count, unit="image", mininterval=1) as bar:
            for batch in batches:
                images = normalise(batch)
                parts = [self._trunk(images)]
                if self._guide:
                    features = parts[0][:, :, None, None]
                    parts.append(self._guide(features if self._from_features else images)[-1])
                rows[start : start + len(batch)] = torch.cat(parts, 1).cpu()
                start += len(batch)
                bar.update(len(batch))
        return resident(rows[:, :, None, None], device)


class Answers(nn.Module):
    """The teacher's logits as they stand in the rows, `[1, N, K]`."""

    def __init__(self, columns: slice, vectors: Tensor) -> None:
        super().__init__()
        self.columns, self.vectors = columns, vectors

    def forward(self, rows: Tensor) -> Tensor:
        return rows[None, :, self.columns, 0, 0]

    def class_vectors(self) -> Tensor:
        """The teacher's own: its last linear weights, `[K, D]`."""
        return self.vectors


class _Trunk(nn.Module):
    """Images to the features of every exit, up to the exit's first layer that learns, `[N, D]`."""

    def __init__(self, network: BranchyNet) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(network.trunk)
        self.before = nn.ModuleList(_split(exit)[0] for exit in network.exits)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([features.flatten(1) for features in self.parts(images)], 1)

    def parts(self, images: Tensor) -> list[Tensor]:
        features, parts = images.contiguous(memory_format=torch.channels_last), []
        for block, before in zip(self.blocks, self.before, strict=True):
            features = block(features)
            parts.append(before(features))
        return parts


class _Heads(nn.Module):
    def __init__(self, places: list[tuple[slice, torch.Size]], heads: list[nn.Module]) -> None:
        super().__init__()
        self.places, self.heads = places, nn.ModuleList(heads)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.stack(
            [
                head(rows[:, columns, 0, 0].view(len(rows), *shape))
                for (columns, shape), head in zip(self.places, self.heads, strict=True)
            ]
        )


class _Unchanged(Normalise):
    """Rows are normalised already."""

    def __init__(self, device: torch.device) -> None:
        self.mean = self.std = torch.zeros(1, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        return images.to(self.mean.device)


def _same_trunk(network: BranchyNet, teacher: BranchyNet) -> bool:
    """Whether both compute the same features in front of the backbone's own classifier."""
    if teacher.architecture.backbone != network.architecture.backbone:
        return False
    if teacher._forward_pre_hooks:  # it takes images normalised in another way
        return False
    own, other = network.backbone.state_dict(), teacher.backbone.state_dict()
    return all(torch.equal(own[name], tensor) for name, tensor in other.items())


def _is_random(settings: Augmentation) -> bool:
    return bool(
        settings.crop_padding or settings.flip or settings.cutout or settings.trivial_augment
    )


def _split(exit: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What of an exit can never change, and the rest."""
    body, head = exit.get_submodule("body"), exit.get_submodule("head")
    if any(True for _ in body.children()):
        return nn.Identity(), nn.Sequential(body, head)
    if isinstance(head, fx.GraphModule):
        return _split_graph(head)
    layers = list(head.children())
    first = next(number for number, layer in enumerate(layers) if _changes(layer))
    return nn.Sequential(*layers[:first]), nn.Sequential(*layers[first:])


def _split_graph(head: fx.GraphModule) -> tuple[nn.Module, nn.Module]:
    nodes = list(head.graph.nodes)
    place = 0
    while nodes[place + 1].all_input_nodes == [nodes[place]] and len(nodes[place].users) == 1:
        after = nodes[place + 1]
        if after.op == "output" or "dropout" in str(after.target):
            break
        if after.op == "call_module" and _changes(head.get_submodule(str(after.target))):
            break
        place += 1
    before, rest = fx.Graph(), fx.Graph()
    copies = {nodes[0]: before.placeholder("x")}
    for node in nodes[1 : place + 1]:
        copies[node] = before.node_copy(node, copies.__getitem__)
    before.output(copies[nodes[place]])
    copies = {nodes[place]: rest.placeholder("x")}
    for node in nodes[place + 1 :]:
        copies[node] = rest.node_copy(node, copies.__getitem__)
    return fx.GraphModule(head, before), fx.GraphModule(head, rest)


def _changes(layer: nn.Module) -> bool:
    """Whether a layer learns, or is another in training."""
    return bool(layer.state_dict()) or isinstance(layer, nn.modules.dropout._DropoutNd)
