"""A single-exit network trained alone: a teacher, or a branch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from edgeke.learning.fit import OnEpoch, fit, kept_epoch
from edgeke.learning.frozen import keep_statistics
from edgeke.learning.frozen_trunk import Features
from edgeke.learning.images import Images
from edgeke.learning.objectives import Objective
from edgeke.learning.resume import ResumeFile, fingerprint
from edgeke.learning.trained import Trained
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import Plan


def train_alone(
    architecture: Architecture,
    objective: Objective,
    images: Images,
    plan: Plan,
    *,
    description: str,
    on_epoch: OnEpoch,
    slot: str,
    depends_on: Mapping[str, object],
    weights: Mapping[str, Tensor] | None = None,
    features: Features | None = None,
    exit: int = 0,
) -> Trained:
    """Build a network and train it; the seed fixes fresh weights, order and augmentation.

    Its checkpoint is named by `slot` and by all that `depends_on` holds. `weights` are those that
    its trunk starts from. With `features`, of exit number `exit` of a frozen trunk with these
    weights, only the exit learns; `images` and `plan` are then theirs.
    """
    torch.manual_seed(plan.seed)
    network = BranchyNet(architecture, weights)
    resume = ResumeFile(slot, **depends_on, start=fingerprint(network))
    started = weights is not None
    if started and plan.optimisation.keep_statistics:
        keep_statistics(network.backbone)
    history = fit(
        features.view({exit: network.exits[0]}) if features else network,
        objective,
        images,
        plan,
        description=description,
        on_epoch=on_epoch,
        root=network,
        resume=resume,
        trunk=network.backbone if started else None,
    )
    return Trained(network, history, (resume,), kept_epoch(history, plan))
