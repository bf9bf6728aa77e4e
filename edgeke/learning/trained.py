"""What a training hands back."""

from dataclasses import dataclass

from edgeke.learning.fit import History
from edgeke.learning.resume import ResumeFile
from edgeke.networks.branchynet import BranchyNet


@dataclass(frozen=True)
class Trained:
    """A trained network with its history, and the checkpoints to delete once it is saved.

    `kept` is the epoch, counted from 1, that the weights are of.
    """

    network: BranchyNet
    history: History
    resumes: tuple[ResumeFile, ...]
    kept: int

    @property
    def metrics(self) -> dict[str, float]:
        """The row of the epoch that was kept."""
        return self.history[self.kept - 1]

    def rows(self) -> list[dict[str, object]]:
        """The history as rows of a table, epochs counted from 1."""
        return [{"epoch": epoch, **row} for epoch, row in enumerate(self.history, 1)]

    def remove_checkpoints(self) -> None:
        """Delete the checkpoints of this training."""
        for resume in self.resumes:
            resume.remove()
