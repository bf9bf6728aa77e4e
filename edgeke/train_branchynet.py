"""Stage `train_branchynet`: all exits of one network, trained in a certain order."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from edgeke.data.dataset import Dataset
from edgeke.device.codec import parse_codec
from edgeke.learning.architectures import start_weights
from edgeke.learning.fit import OnEpoch, fit
from edgeke.learning.frozen import keep_statistics
from edgeke.learning.frozen_trunk import Features
from edgeke.learning.images import Images
from edgeke.learning.objectives import Objective, class_weights, make_objective
from edgeke.learning.orders import Order, Phase, without_codec
from edgeke.learning.parallel import local_device
from edgeke.learning.phases import CodedExits, OneExit, phase_network
from edgeke.learning.predict import evaluate
from edgeke.learning.resume import ResumeFile, fingerprint
from edgeke.learning.trained import Trained
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import KD, CodecInLoop, Network, Plan


def train_branchynet(
    dataset: Dataset,
    student: Architecture,
    order: Order,
    branches: Mapping[int, BranchyNet],
    teacher: BranchyNet | None,
    kd: KD,
    plans: Sequence[Plan],
    *,
    start: Network,
    seed: int,
    weights: tuple[float, ...],
    detach: bool,
    codec: CodecInLoop | None = None,
    on_epoch: OnEpoch,
) -> tuple[Trained, BranchyNet]:
    """Train a BranchyNet from distilled branches; returns it, and its plain baseline.

    `start` says where the trunk starts, and whether it is frozen. Then the branches are exits of
    one trunk already, and nothing is trained again unless the main exit supervises. Exits whose
    trunk does not change, and that have no layers before their heads, learn on features that are
    computed once. `branches` maps numbers to networks: those that the order starts from and the
    main one, or all where the trunk is frozen.
    `plans` has one plan for each phase; what later phases do not train again stays unchanged.
    Where exits learn together, their losses have the weights `weights` `[E]`, and with `detach`
    the early exits do not move the trunk. With `codec` what is behind its exit learns from features
    that went through it: in joint phases, or else in the order's last phase. The history has one
    row an epoch, its keys named by exit.
    Needs the splits train and validation.

    The baseline is the main network without early exits, trained as long as the main exit: a copy
    of the distilled main branch, or, after joint phases, a network that learnt in the same phases
    from the same start.
    """
    device = local_device()
    images = Images.of(dataset, device)
    teacher = teacher.to(device) if teacher else None
    main = len(student.exits) - 1
    behind = None
    if codec is not None:
        order, behind = without_codec(order, student.depths)
    by_teacher = kd.source == "teacher" or kd.distance == "none"
    if start.trunk == "frozen" and by_teacher:
        order = replace(order, starts=tuple(range(main + 1)), phases=())
    weights_at_start = None if order.starts else start_weights(start, student.backbone, seed)
    torch.manual_seed(seed)
    network = BranchyNet(student, weights_at_start)
    for number in order.starts:
        network.load_branch(number, branches[number])
    torch.manual_seed(seed)
    plain = BranchyNet(student.branch(main), weights_at_start)
    if order.starts:
        plain.load_branch(0, branches[main])
    network.to(device)
    depends_on = {
        "plans": plans,
        "kd": kd,
        "network": start,
        "weights": weights,
        "detach": detach,
        "order": order,
        "architecture": student,
        "start": fingerprint(network),
        "data": dataset.sha256,
        "teacher": fingerprint(teacher),
    }
    if codec is not None:
        depends_on["codec"] = codec
    if start.weights is not None and plans and plans[0].optimisation.keep_statistics:
        keep_statistics(network.backbone)
        keep_statistics(plain.backbone)
    resumes: list[ResumeFile] = []
    rows: dict[int, dict[str, float]] = {}

    def on_phase_epoch(epoch: int, row: dict[str, float]) -> None:
        rows.setdefault(epoch, {}).update(row)
        on_epoch(epoch, row)

    def train(
        number: int,
        root: BranchyNet,
        view: nn.Module,
        objective: Objective,
        names: tuple[str, ...],
        features: Features | None = None,
    ) -> None:
        slot = f"train_branchynet/{number}/{'plain' if root is plain else 'exits'}"
        resumes.append(ResumeFile(slot, **depends_on))
        fit(
            view,
            objective,
            features.images if features else images,
            features.plan if features else plans[number],
            description=", ".join(names),
            on_epoch=on_phase_epoch,
            names=names,
            root=root,
            resume=resumes[-1],
            trunk=root.backbone if start.weights is not None else None,
        )

    if order.phases and (start.trunk == "frozen" or _only_heads(network, order, plans)):
        learn = sorted({exit for phase in order.phases for exit in phase.exits})
        features = Features(network, images, plans[0], teacher)
        joint = main in learn
        objective = make_objective(
            kd,
            features.teacher,
            main=None if joint else features.view({main: network.exits[main]}),
            joint=joint,
            weights=(1.0,) * len(learn),
            label_smoothing=plans[0].optimisation.label_smoothing,
            class_weights=class_weights(images, plans[0].optimisation),
            paper_factor=order.paper_factor,
        )
        view = features.view({exit: network.exits[exit] for exit in learn})
        train(0, network, view, objective, tuple(f"exit_{exit}" for exit in learn), features)
        plain = network.branch(main) if main in learn else plain
        phases: tuple[Phase, ...] = ()
    else:
        phases = order.phases
    for number, phase in enumerate(phases):
        joint = len(phase.exits) > 1
        smoothing = plans[number].optimisation.label_smoothing
        balance = class_weights(images, plans[number].optimisation)
        # The main exit supervises the others once it has learnt: it is a distilled branch.
        supervises = main in order.starts and not joint
        objective = make_objective(
            kd,
            teacher,
            main=OneExit(network, main, network.attached[main]) if supervises else None,
            joint=joint,
            weights=weights if joint else None,
            label_smoothing=smoothing,
            class_weights=balance,
            paper_factor=order.paper_factor,
        )
        view = phase_network(network, phase, detach=detach)
        if joint and codec is not None:
            view = CodedExits(network, phase, codec.after, parse_codec(codec.codec), detach)
        train(number, network, view, objective, tuple(f"exit_{exit}" for exit in phase.exits))
        if joint:
            alone = make_objective(
                kd, teacher, joint=True, label_smoothing=smoothing, class_weights=balance
            )
            train(number, plain, plain, alone, ("plain",))
    if codec is not None and behind is not None:
        objective = make_objective(
            replace(kd, source="teacher"),
            teacher,
            joint=True,
            label_smoothing=plans[-1].optimisation.label_smoothing,
            class_weights=class_weights(images, plans[-1].optimisation),
        )
        view = CodedExits(network, behind, codec.after, parse_codec(codec.codec), detach)
        names = tuple(f"coded_exit_{exit}" for exit in behind.exits)
        train(len(plans) - 1, network, view, objective, names)
    history = [rows[epoch] for epoch in sorted(rows)]
    return Trained(network.eval(), history, tuple(resumes), len(history)), plain.eval()


def _only_heads(network: BranchyNet, order: Order, plans: Sequence[Plan]) -> bool:
    """Whether every phase trains a head on a trunk that no phase changes, all after one plan."""
    return all(plan == plans[0] for plan in plans) and all(
        phase.frozen == network.attached[exit]
        and not list(network.get_submodule(f"exits.{exit}.body").children())
        for phase in order.phases
        for exit in phase.exits
    )


def exit_metrics(network: BranchyNet, plain: BranchyNet, dataset: Dataset) -> dict[str, float]:
    """Validation cross-entropy and accuracy of every exit, and of the plain baseline."""
    images = Images.of(dataset, local_device())
    device, names = images.device, tuple(f"exit_{exit}" for exit in range(len(network.exits)))
    exits = evaluate(network.to(device), images, names)
    return exits | evaluate(plain.to(device), images, ("plain",))
