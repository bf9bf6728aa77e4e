"""Every way that teams run experiments, for real, on profile `tiny`: all lands in the one store."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from pipelines import ENVIRONMENT, children, client, parents, ran, run

pytestmark = [
    pytest.mark.xdist_group("pipeline"),
    pytest.mark.pipeline,
    pytest.mark.filterwarnings("ignore:::mlflow"),
]


@pytest.fixture(scope="module")
def clone(tiny: Path, tmp_path_factory) -> Path:
    """A clone whose last commit is a finished `tiny`."""
    root = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("team") / "edgeke", symlinks=True))
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "--quiet", "-m", "tiny")
    return root


def by_experiment(root: Path) -> dict[str, object]:
    """Parents by DVC's name."""
    return {run.data.tags["DVC_EXP_NAME"]: run for run in parents(root)}


def check_agreement(root: Path, names: list[str]) -> None:
    """`dvc exp show` and MLflow hold the same parameters and numbers of experiments."""
    rows = json.loads(run(root, "dvc", "exp", "show", "--json", "--num", "9"))
    groups = [group["revs"][0] for row in rows for group in row["experiments"] or ()]
    shown = {newest["name"]: newest["data"] for newest in groups}
    for name in names:
        parent, data = by_experiment(root)[name], shown[name]
        files = [file["data"] or {} for file in data["metrics"].values()]
        values = {key: value for file in files for key, value in file.items()}
        logged = parent.data.metrics
        assert len(logged) > 10
        assert {key: values[key] for key in logged} == pytest.approx(logged, rel=1e-5)
        params = data["params"]["params.yaml"]["data"]
        for section, key in (("kd", "beta"), ("kd", "distance"), ("branchynet", "order")):
            assert str(params[section][key]) == parent.data.params[f"{section}.{key}"]


def queue(root: Path, *changes: str) -> list[str]:
    """Queue experiments and run them two at a time; their names."""
    settings = [word for change in changes for word in ("-S", change)]
    queued = run(root, "dvc", "exp", "run", "--queue", *settings)
    names = [line.split("'")[1] for line in queued.splitlines() if line.startswith("Queued")]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    log = root.parent / "queue.log"
    with log.open("w") as out:  # its workers keep what they inherit open
        subprocess.run(
            ["dvc", "queue", "start", "-j", "2"],
            cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=True,
        )  # fmt: skip
    deadline = time.monotonic() + 1800
    while time.monotonic() < deadline:
        rows = [r for r in run(root, "dvc", "queue", "status").splitlines() if r.split()[1:]]
        ours = [row for row in rows if any(name in row for name in names)]
        if len(ours) == len(names) and all("Success" in row for row in ours):
            return names
        assert not any("Failed" in row for row in ours), "\n".join(
            run(root, "dvc", "queue", "logs", name, check=False)[-2000:] for name in names
        )
        time.sleep(5)  # DVC's answer costs a second of a core that the workers need
    raise AssertionError("the queue did not end:\n" + run(root, "dvc", "queue", "status"))


def test_a_grid_over_two_workers(clone: Path):
    before = (clone / "dvc.lock").read_bytes()
    names = queue(clone, "branchynet.order=synchronous,mixed")
    runs = [by_experiment(clone)[name] for name in names]
    assert [run.info.run_name for run in runs] == [
        f"tiny-kl-{order}-b0.5-{name}"
        for order, name in zip(("synchronous", "mixed"), names, strict=True)
    ]
    for parent in runs:
        assert parent.info.status == "FINISHED"
        assert parent.data.tags["edgeke.model"].startswith("edgeke-tiny/")
        links = {key for key in parent.data.tags if key.startswith("edgeke.restored.")}
        restored = ("download", "train_teacher", "distill", "prune")
        assert links == {f"edgeke.restored.{stage}" for stage in restored}
    check_agreement(clone, names)
    assert (clone / "dvc.lock").read_bytes() == before


@pytest.mark.slow  # a queue's workers run in the same kind of folder
def test_beside_the_workspace(clone: Path):
    before = run(clone, "git", "status", "--porcelain")
    run(clone, "dvc", "exp", "run", "--temp", "--name", "aside", "-S", "kd.beta=0.3")
    assert run(clone, "git", "status", "--porcelain") == before
    parent = by_experiment(clone)["aside"]
    assert parent.info.run_name == "tiny-kl-asynchronous-b0.3-aside"
    tags = parent.data.tags
    assert tags["edgeke.dirty"] == "false"
    assert tags["mlflow.source.git.commit"] == run(clone, "git", "rev-parse", "HEAD").strip()
    assert len(tags["edgeke.state"]) == len(tags["edgeke.content"]) == 16
    check_agreement(clone, ["aside"])


def test_a_run_killed_half_way_is_marked_and_the_next_goes_on(clone: Path):
    """kill -9 for all of it, as a power cut would; tiny's epochs are lengthened to hit one.

    With `--temp` each run is in a folder of its own, which is gone with it; checkpoints are not.
    """
    epochs = "profiles.tiny.recipes.distill.epochs=60"
    command = ["dvc", "exp", "run", "--temp", "-S", epochs, "-S", "kd.beta=0.7", "distill"]
    with subprocess.Popen(
        [*command, "--name", "cut"],
        cwd=clone, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            wait_for_epoch(clone, "cut", 10)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    cut = by_experiment(clone)["cut"]
    dead = children(clone, cut.info.run_id)["distill"]
    assert dead.info.status == cut.info.status == "RUNNING"  # nobody could say otherwise
    done = curve(clone, dead.info.run_id)[-1][0]
    assert 10 <= done < 60

    output = run(clone, *command, "--name", "goes-on")
    assert ran(output) == ["distill"]
    store = client(clone)
    assert store.get_run(dead.info.run_id).info.status == "KILLED"
    assert store.get_run(cut.info.run_id).info.status == "KILLED"
    next_run = by_experiment(clone)["goes-on"]
    assert next_run.info.status == "FINISHED"
    resumed = children(clone, next_run.info.run_id)["distill"]
    # The curve is whole, its beginning that of the killed run: nothing was trained twice.
    ours, before = curve(clone, resumed.info.run_id), curve(clone, dead.info.run_id)
    assert sorted({epoch for epoch, _ in ours}) == list(range(1, 61))
    saved = done - done % 5
    assert ours[:saved] == before[:saved]
    assert resumed.data.metrics["validation/branch_0/accuracy"] > 0


def curve(root: Path, child: str) -> list[tuple[int, float]]:
    history = client(root).get_metric_history(child, "validation/branch_0/loss")
    return sorted((metric.step, metric.value) for metric in history)


def wait_for_epoch(root: Path, experiment: str, epoch: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        parent = by_experiment(root).get(experiment)
        child = parent and children(root, parent.info.run_id).get("distill")
        if child and curve(root, child.info.run_id)[-1:] >= [(epoch, 0.0)]:
            return
        time.sleep(0.2)
    raise AssertionError("the training did not get there")
