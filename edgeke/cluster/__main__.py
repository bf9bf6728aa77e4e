"""One image on several devices: python -m edgeke.cluster {profile,plan,show,serve} BUNDLE.

docs/cluster.md says how devices join.
"""

import argparse
import logging
import sys
from pathlib import Path

from edgeke.cluster.actors import connect, load_ray, start_actors
from edgeke.cluster.engine import Engine, describe
from edgeke.cluster.network import Network, read_network
from edgeke.cluster.plan import FILE, Plan, Profile, make_plan, read_cluster, write_cluster
from edgeke.cluster.profile import measure_cluster
from edgeke.cluster.show import show
from edgeke.device.bundle import PRECISIONS, find_bundle, segments_hash
from edgeke.errors import InputError, report


def main(arguments: list[str] | None = None) -> int:
    """Run a command. 0, or 1 for bad input."""
    parser = argparse.ArgumentParser(prog="edgeke.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("bundle", type=Path, help="a bundle folder, with segments/ in it")
    shared.add_argument("--precision", choices=tuple(PRECISIONS), help="default: int8 if present")
    shared.add_argument("--file", type=Path, help=f"default: {FILE} in the bundle")
    joined = argparse.ArgumentParser(add_help=False)
    joined.add_argument("--address", help="of the cluster, HOST:6379 (default: this machine's)")
    joined.add_argument("--local", type=int, metavar="N", help="N devices on this machine, to try")
    joined.add_argument("--threads", type=int, default=1, help="of ONNX Runtime on each device")
    profile = commands.add_parser("profile", parents=[shared, joined], help="measure the cluster")
    profile.add_argument("--rounds", type=int, default=10)
    profile.add_argument(
        "--memory", nargs="*", default=[], metavar="NAME=MB", help="what a device may use"
    )
    commands.add_parser("plan", parents=[shared], help="plan anew from the profile")
    commands.add_parser("show", parents=[shared], help="what the plan is, and what it costs")
    serve = commands.add_parser("serve", parents=[shared, joined], help="answer over HTTP")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(arguments)
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    try:
        _run(options)
    except InputError as error:
        return report(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    bundle = find_bundle(options.bundle, options.precision)
    if bundle.segments is None:
        raise InputError(f"there are no segments in {options.bundle}; give the bundle folder")
    network = read_network(bundle.segments)
    names = network.manifest.segments
    model = segments_hash([bundle.segments / name for name in names])
    precision = str(bundle.precision)
    file = options.file or options.bundle / FILE
    if options.command == "profile":
        profile = _measured(options, network, model, precision)
        plan = make_plan(network, profile)
        write_cluster(file, profile, plan)
        print(f"{file}: {describe(plan)}")
        return
    if options.command == "serve":
        _serve(options, network, model, precision, file)
        return
    profile, old = read_checked(file, model)
    if options.command == "plan" or old is None:
        plan = make_plan(network, profile)
        write_cluster(file, profile, plan)
        print(f"{file}: {describe(plan)}")
    else:
        print("\n".join(show(network, profile, old)))


def read_checked(file: Path, model: str) -> tuple[Profile, Plan | None]:
    """cluster.json. Errors: InputError when it is of another network."""
    profile, plan = read_cluster(file)
    if profile.model != model:
        raise InputError(
            f"{file} is of another network or precision than these segments; run "
            "`python -m edgeke.cluster profile` again"
        )
    return profile, plan


def _measured(options: argparse.Namespace, network: Network, model: str, precision: str) -> Profile:
    """The cluster's profile, its devices' processes ended again."""
    names = connect(options.address, options.local)
    if not names:
        raise InputError(
            "no node of the cluster is a device; join one: ray start --address=HOST:6379 "
            "--resources='{\"edgeke:NAME\": 1}'"
        )
    memory = _memory(getattr(options, "memory", []), names)
    actors = start_actors(names, options.threads)
    try:
        rounds = getattr(options, "rounds", 5)
        return measure_cluster(network, actors, model, precision, rounds, memory)
    finally:
        for actor in actors.values():
            load_ray().kill(actor)


def _memory(texts: list[str], names: list[str]) -> dict[str, int]:
    memory = {}
    for text in texts:
        name, _, size = text.partition("=")
        if name not in names or not size.isdigit():
            raise InputError(
                f"--memory {text}: say NAME=MB of one of {', '.join(names)}, such as {names[0]}=700"
            )
        memory[name] = int(size) * 1_000_000
    return memory


def _serve(
    options: argparse.Namespace, network: Network, model: str, precision: str, file: Path
) -> None:
    try:
        import uvicorn

        from edgeke.cluster.serve import ClusterServer
        from edgeke.serving.application import Settings
        from edgeke.serving.front import UVICORN
    except ImportError as error:
        raise InputError(
            f"{error.name} is missing: pip install -r requirements-serving.txt"
        ) from None
    if options.local is not None and not file.exists():
        profile = _measured(options, network, model, precision)
        plan: Plan | None = make_plan(network, profile)
        write_cluster(file, profile, plan)
    else:
        profile, plan = read_checked(file, model)
        if not load_ray().is_initialized():
            connect(options.address, options.local)
    with Engine(network, profile, plan=plan, threads=options.threads) as engine:
        settings = Settings(options.bundle, precision, options.threads)
        server = ClusterServer(settings, engine=engine)
        server.check()
        print(f"{describe(engine.plan)}; http://{options.host}:{options.port}", flush=True)
        uvicorn.run(server.application, host=options.host, port=options.port, **UVICORN)


if __name__ == "__main__":
    sys.exit(main())
