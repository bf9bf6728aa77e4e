"""Stage `train_teacher`: the large single-exit network that supervises all others."""

import torch

from edgeke.data.dataset import Dataset
from edgeke.learning.architectures import teacher_architecture
from edgeke.learning.fit import OnEpoch, fit
from edgeke.learning.images import Images
from edgeke.learning.objectives import CrossEntropy
from edgeke.learning.parallel import local_device
from edgeke.learning.resume import ResumeFile, fingerprint
from edgeke.learning.trained import Trained
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import Network, Plan

__all__ = ["train_teacher"]


def train_teacher(dataset: Dataset, network: Network, plan: Plan, *, on_epoch: OnEpoch) -> Trained:
    """Train the teacher on labels alone; needs the splits train and validation."""
    architecture = teacher_architecture(network, dataset)
    torch.manual_seed(plan.seed)
    teacher = BranchyNet(architecture)
    resume = ResumeFile(
        "train_teacher",
        plan=plan,
        architecture=architecture,
        start=fingerprint(teacher),
        data=dataset.sha256,
    )
    history = fit(
        teacher,
        CrossEntropy(label_smoothing=plan.optimisation.label_smoothing),
        Images.of(dataset, local_device()),
        plan,
        description="teacher",
        on_epoch=on_epoch,
        resume=resume,
    )
    return Trained(teacher, history, (resume,))
