"""A plan in words and lines: which rows where, when each device works, what travels."""

from collections.abc import Iterator

from edgeke.cluster.network import Network
from edgeke.cluster.plan import Plan, Profile, expected_work
from edgeke.cluster.strips import build, own_rows
from edgeke.cluster.worker import Phase

_WIDTH = 60


def show(network: Network, profile: Profile, plan: Plan) -> Iterator[str]:
    """The lines."""
    yield "expected until each exit: " + ", ".join(f"{s * 1e3:.2f} ms" for s in plan.seconds)
    yield "alone: " + ", ".join(f"{name} {s * 1e3:.2f} ms" for name, s in plan.alone.items())
    for device in profile.devices:
        if device.name not in plan.devices:
            yield f"{device.name} is not used"
    if len(plan.devices) == 1:
        yield f"{plan.devices[0]} works alone ({plan.memory[0] / 1e6:.0f} MB)"
        return
    work = expected_work(network, profile, plan)
    yield ""
    yield "device, rows of each exchanged map, work (#) and waiting (.), memory"
    for place, name in enumerate(plan.devices):
        rows = []
        for cut in ("image", *plan.layout.exchanged, plan.layout.gathered):
            low, high = own_rows(network, cut, plan.layout, place)
            rows.append(f"{low}-{high - 1}")
        busy = round(_WIDTH * min(1.0, work[place] / plan.seconds[-1]))
        leads = " leads" if place == plan.layout.leader else ""
        yield f"{name}{leads}: {' '.join(rows)}"
        line = "#" * busy + "." * (_WIDTH - busy)
        yield f"  {line} {work[place] * 1e3:.2f} ms, {plan.memory[place] / 1e6:.0f} MB"
    yield ""
    yield "bytes per image and link"
    programs = build(network, plan.layout).programs
    names = [*plan.devices, f"{plan.devices[plan.layout.leader]}, to lead"]
    for place, program in enumerate(programs):
        for target, size in sorted(_bytes(network, program.phases).items()):
            if target != place:
                yield f"  {names[place]} -> {names[target]}: {size:,}"


def _bytes(network: Network, phases: tuple[Phase, ...]) -> dict[int, int]:
    """Bytes that a device sends, by target."""
    sent: dict[int, int] = {}
    for phase in phases:
        for message in phase.messages:
            size = sum(
                (high - low) * network.row_bytes(name) for name, _, low, high in message.rows
            )
            for name in message.pooled:
                shape = network.shapes[name.removesuffix("/mean")]
                size += 4 * shape[0] * shape[1]
            sent[message.target] = sent.get(message.target, 0) + size
    return sent
