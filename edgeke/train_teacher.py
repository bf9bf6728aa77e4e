"""Stage `train_teacher`: the large single-exit network that supervises all others."""

from edgeke.data.dataset import Dataset
from edgeke.learning.alone import train_alone
from edgeke.learning.architectures import start_weights, teacher_architecture
from edgeke.learning.fit import OnEpoch
from edgeke.learning.frozen_trunk import Features
from edgeke.learning.images import Images
from edgeke.learning.objectives import CrossEntropy, class_weights
from edgeke.learning.parallel import local_device
from edgeke.learning.trained import Trained
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import Network, Plan


def train_teacher(dataset: Dataset, network: Network, plan: Plan, *, on_epoch: OnEpoch) -> Trained:
    """Train the teacher on labels alone; needs the splits train and validation.

    With a frozen trunk only its classifier learns.
    """
    architecture = teacher_architecture(network, dataset)
    images = Images.of(dataset, local_device())
    weights, features = start_weights(network, architecture.backbone, plan.seed), None
    key = {"plan": plan, "architecture": architecture, "network": network, "data": dataset.sha256}
    if network.trunk == "frozen":
        features = Features(BranchyNet(architecture, weights), images, plan, None)
        images, plan = features.images, features.plan
    return train_alone(
        architecture,
        CrossEntropy(
            label_smoothing=plan.optimisation.label_smoothing,
            class_weights=class_weights(images, plan.optimisation),
        ),
        images,
        plan,
        description="teacher",
        on_epoch=on_epoch,
        slot="train_teacher",
        depends_on=key,
        weights=weights,
        features=features,
    )
