"""How strongly each distance pulls, relative to KL.  python -m benchmarks.gradient_scales

The mean norm of the gradient of T^2 D with respect to the student's logits, over drawn teachers and
students near them (noise of 0.3 on logits of deviation 3) and far from them (1.5). Prints a table
and, last, one JSON line.
"""

import json

import torch

from edgeke.learning.distances import DISTANCES, class_costs

CLASSES, SAMPLES = 10, 2000


def scales(noise: float, temperature: float) -> dict[str, float]:
    """Mean gradient norm per distance, divided by KL's."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(SAMPLES, CLASSES, generator=generator)
    start = teacher + noise * torch.randn(SAMPLES, CLASSES, generator=generator)
    costs = class_costs(torch.randn(CLASSES, 16, generator=generator))
    norms = {}
    for name, distance in DISTANCES.items():
        student = start.clone().requires_grad_()
        value = distance(student, teacher, temperature, teacher.argmax(-1), costs)
        (gradient,) = torch.autograd.grad(temperature**2 * value.sum(), student)
        norms[name] = float(gradient.norm(dim=-1).mean())
    return {name: norm / norms["kl"] for name, norm in norms.items()}


def main() -> None:
    """Print the table, then one JSON line."""
    result = {}
    print(
        "| student | T | " + " | ".join(DISTANCES) + " |\n" + "| --- " * (2 + len(DISTANCES)) + "|"
    )
    for where, noise in (("near", 0.3), ("far", 1.5)):
        for temperature in (1.0, 4.0, 8.0):
            norms = scales(noise, temperature)
            cells = " | ".join(f"{value:.2f}" for value in norms.values())
            print(f"| {where} | {temperature:g} | {cells} |")
            result[f"{where}_{temperature:g}"] = {k: round(v, 3) for k, v in norms.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
