"""Stage `prune`: channels of the trained main network are removed, step by step."""

import math
from dataclasses import dataclass, replace

from edgeke.data.dataset import Dataset
from edgeke.learning.channels import remove_channels
from edgeke.learning.fit import OnEpoch, fit, kept_epoch
from edgeke.learning.images import Images
from edgeke.learning.objectives import class_weights, make_objective
from edgeke.learning.parallel import local_device
from edgeke.learning.predict import evaluate
from edgeke.learning.resume import ResumeFile, fingerprint
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.cost import exit_costs
from edgeke.params import KD, Network, Plan, Prune

# No step leaves less than this share of the operations before it. With smaller steps each has too
# few epochs to recover in (docs/training.md).
_STEP = 0.7


@dataclass(frozen=True)
class Pruned:
    """The smaller network, its history, metrics, and the checkpoints to delete once it is saved."""

    network: BranchyNet
    rows: list[dict[str, object]]
    metrics: dict[str, float]
    resumes: list[ResumeFile]


def prune(
    dataset: Dataset,
    main: BranchyNet,
    teacher: BranchyNet | None,
    kd: KD,
    settings: Prune,
    plan: Plan,
    *,
    start: Network,
    on_epoch: OnEpoch,
) -> Pruned:
    """Remove channels of `main`, the distilled main branch, in steps of equal shares.

    After each step the network is distilled again; all steps together take the plan's epochs, at
    least one each. It ends when `settings.macs` is reached, or goes back a step when validation
    accuracy is more than `settings.max_loss` below that of `main`. `start` says where the trunk
    started. The checkpoint of a finished step is kept, so that a later call does not train it
    again. Needs the splits train and validation.
    """
    device, size = local_device(), main.architecture.backbone.image_size
    images = Images.of(dataset, device)
    teacher = teacher.to(device) if teacher else None
    objective = make_objective(
        kd,
        teacher,
        label_smoothing=plan.optimisation.label_smoothing,
        class_weights=class_weights(images, plan.optimisation),
        paper_factor=1.0,
    )
    shares = step_shares(settings.macs)
    recipe = replace(plan.recipe, epochs=math.ceil(plan.recipe.epochs / len(shares)))
    plan = replace(plan, recipe=recipe)
    kept, whole = main, exit_costs(main, size)[0].macs
    before = evaluate(main.to(device), images)
    metrics, rows, resumes, steps = before, list[dict[str, object]](), list[ResumeFile](), 0
    for number, share in enumerate(shares, 1):
        smaller = remove_channels(kept, share * whole)
        part = exit_costs(smaller, size)[0].macs / whole
        resumes.append(
            ResumeFile(
                f"prune/{number}",
                plan=plan,
                kd=kd,
                network=start,
                architecture=smaller.architecture,
                start=fingerprint(smaller),
                data=dataset.sha256,
                teacher=fingerprint(teacher),
            )
        )
        done = len(rows)

        def on_step_epoch(epoch: int, row: dict[str, float], done: int = done) -> None:
            on_epoch(done + epoch, row)

        history = fit(
            smaller,
            objective,
            images,
            plan,
            description=f"pruned to {part:.0%}",
            on_epoch=on_step_epoch,
            resume=resumes[-1],
            trunk=smaller.backbone if start.weights is not None else None,
        )
        rows += [
            {"epoch": done + epoch, "cost/macs_share": part, **row}
            for epoch, row in enumerate(history, 1)
        ]
        after = history[kept_epoch(history, plan) - 1]
        lost = before["validation/accuracy"] - after["validation/accuracy"]
        if lost > settings.max_loss + 1e-9:
            break
        kept, metrics, steps = smaller, after, number
    cost = exit_costs(kept, size)[0]
    metrics = {key: metrics[key] for key in before} | {
        "validation/accuracy_before": before["validation/accuracy"],
        "cost/macs": cost.macs,
        "cost/macs_share": cost.macs / whole,
        "steps": steps,
    }
    return Pruned(kept.eval(), rows, metrics, resumes)


def step_shares(macs: float) -> list[float]:
    """The share of the operations that is left after each step, down to `macs`."""
    count = math.ceil(math.log(macs) / math.log(_STEP) - 1e-9)
    return [macs ** (number / count) for number in range(1, count + 1)]
