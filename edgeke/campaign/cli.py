"""The command line of scripts/cifar100."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from edgeke.campaign.settings import (
    PREPARED,
    Settings,
    campaign_content,
    commit,
    prepare,
    read_content,
)
from edgeke.errors import InputError

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None, description: str | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/cifar100",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = _ROOT.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=data, help="folder that holds cifar100/")
    parser.add_argument("--out", type=Path, help="results; default .edgeke/cifar100")
    parser.add_argument("--minutes", type=float, default=25.0, help="budget of all calls together")
    parser.add_argument("--profile", default="cifar100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--width", type=int, help="of teacher and student, instead of the profile's"
    )
    parser.add_argument("--limit", type=int, help="images per split, for rehearsals")
    parser.add_argument("--epochs", type=int, help="longest schedule, for rehearsals")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="instead of params.yaml's")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--params", type=Path, default=_ROOT / "params.yaml")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="write what travels, and stop")
    parser.add_argument(
        "--import", type=Path, metavar="DIR", dest="home", help="bring an --out folder home to DVC"
    )
    parser.add_argument("--into", type=Path, default=_ROOT, help="where an import writes to")
    options = parser.parse_args(arguments)
    settings = Settings(
        options.profile,
        options.seed,
        options.width,
        options.limit,
        options.epochs,
        options.precision,
        options.compile,
    )
    try:
        _check_positive(options)
        if options.prepare:
            for half in prepare(options.params, options.data, settings, options.prepare):
                print(half)
        elif options.home:
            from edgeke.campaign.bring_home import bring_home  # PyYAML: not on a bare machine

            print(bring_home(options.home, _ROOT, options.data, options.params, options.into))
        else:
            out = (options.out or _ROOT / ".edgeke" / "cifar100").resolve()
            _train(options.params.resolve(), options.data.resolve(), out, settings, options.minutes)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"stopped: {error}" if str(error) else "stopped", file=sys.stderr)
        return 130
    return 0


def _check_positive(options: argparse.Namespace) -> None:
    for name in ("minutes", "width", "limit", "epochs"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name} {value:g} is too small; give more than 0")


def _train(params: Path, data: Path, out: Path, settings: Settings, minutes: float) -> None:
    import torch  # slow to import: not for --help and --prepare

    from edgeke.campaign.record import Record
    from edgeke.campaign.strips import build_dataset, cut_splits, read_strips
    from edgeke.campaign.training import run_steps
    from edgeke.data.dataset import load_dataset
    from edgeke.files import read_json

    content, parsed = campaign_content(read_content(params, data), settings)
    prepared = data / "cifar100" / PREPARED
    held = read_json(prepared) if prepared.exists() else {}
    record = Record(
        out,
        settings,
        {"params": content, "commit": commit(_ROOT) or held.get("commit")},
    )
    file = out / "dataset.safetensors"
    if not file.exists():
        found = read_strips(data / "cifar100")
        ready = held.get("splits") if held.get("seed") == settings.seed else None
        splits = ready or cut_splits(found, parsed.profile.data, settings.seed)
        source = parsed.profile.data.source
        build_dataset(
            found, splits, file,
            name=settings.profile, source=source, seed=settings.seed, limit=settings.limit,
        )  # fmt: skip
    record.write(dataset_sha256=load_dataset(file, ()).sha256)
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True  # one shape, thousands of steps
        torch.set_float32_matmul_precision("high")
    os.chdir(out)  # the checkpoints of a step in progress lie in .edgeke/ of the current folder
    run_steps(parsed, record, file, out, minutes, settings.epochs)
    print(out / "results.json")
