"""A network trained from fresh weights, and what every training hands back."""

from dataclasses import dataclass

import torch

from edgeke.learning.fit import History, OnEpoch, fit
from edgeke.learning.images import Images
from edgeke.learning.objectives import Objective
from edgeke.learning.resume import ResumeFile
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import Plan

__all__ = ["Trained", "train_from_scratch"]


@dataclass(frozen=True)
class Trained:
    """A trained network with its history, and the checkpoints to delete once it is saved."""

    network: BranchyNet
    history: History
    resumes: tuple[ResumeFile, ...]

    def rows(self) -> list[dict[str, object]]:
        """The history as rows of a table, epochs counted from 1."""
        return [{"epoch": epoch, **row} for epoch, row in enumerate(self.history, 1)]

    def remove_checkpoints(self) -> None:
        """Delete the checkpoints of this training."""
        for resume in self.resumes:
            resume.remove()


def train_from_scratch(
    architecture: Architecture,
    objective: Objective,
    images: Images,
    plan: Plan,
    *,
    description: str,
    on_epoch: OnEpoch,
    resume: ResumeFile,
) -> Trained:
    """Build a network and train all of it; the seed fixes weights, order and augmentation."""
    torch.manual_seed(plan.seed)
    network = BranchyNet(architecture)
    history = fit(
        network,
        objective,
        images,
        plan,
        description=description,
        on_epoch=on_epoch,
        resume=resume,
    )
    return Trained(network, history, (resume,))
