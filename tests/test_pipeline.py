"""The whole pipeline, for real: DVC runs the tiny profile in a temporary clone."""

import json
import shutil
from pathlib import Path

import pytest
from pipelines import STAGES, children, metrics, parents, ran, run
from toys import ROOT

pytestmark = [
    pytest.mark.xdist_group("pipeline"),
    pytest.mark.pipeline,
    pytest.mark.filterwarnings("ignore:::mlflow"),
]


@pytest.fixture(scope="module")
def clone(tiny: Path, tmp_path_factory) -> Path:
    """A clone that has run `tiny` once, as the experiment `first`."""
    return Path(shutil.copytree(tiny, tmp_path_factory.mktemp("clone") / "edgeke", symlinks=True))


def test_every_stage_wrote_what_it_promises(clone: Path):
    for stage in STAGES:
        folder = clone / "results" / stage
        assert (folder / "metrics.json").is_file()
        assert (folder / "run.json").is_file()
    for name in ("teacher.json", "branches/2.safetensors", "edgeke.onnx", "static/plain.onnx"):
        assert (clone / "models" / name).is_file()
    assert metrics(clone, "evaluate")["test/full/accuracy"] > 0.3  # ten classes
    assert list(clone.glob("**/.*.tmp")) == []


def test_mlflow_and_the_metrics_files_agree(clone: Path):
    first = parents(clone)[0]
    assert first.info.status == "FINISHED"
    assert first.data.params["profile"] == "tiny"
    assert first.data.tags["DVC_EXP_NAME"] == "first"
    below = children(clone, first.info.run_id)
    assert set(below) == set(STAGES)
    for stage in STAGES:
        written = metrics(clone, stage)
        logged = below[stage].data.metrics
        assert {k: logged[k] for k in written} == pytest.approx(written)
    measured = metrics(clone, "evaluate")
    headline = first.data.metrics
    assert headline["test/default/accuracy"] == measured["test/default/accuracy"]
    assert "test/default/latency_ms_mean" in headline


def test_a_second_repro_does_nothing(clone: Path):
    output = run(clone, "dvc", "repro")
    assert ran(output) == []
    assert "up to date" in output


def test_the_plots_draw(clone: Path):
    shown = json.loads(run(clone, "dvc", "plots", "show", "--json"))
    assert shown.get("errors") in (None, [])
    names = {"training loss", "accuracy against cost", "accuracy against time", "exit shares"}
    assert set(shown["data"]) == names | {
        "reliability", "profile", "confusion", "confusion of the full network",
    }  # fmt: skip
    profile = shown["data"]["profile"][0]["content"]["data"]["values"]
    assert {"normalise", "layer1.0", "exit_0"} <= {row["name"] for row in profile}
    frontier = shown["data"]["accuracy against cost"][0]["content"]["data"]["values"]
    assert {"full", "exit_0", "main", "teacher"} <= {row["name"] for row in frontier}


def test_another_beta_runs_only_what_depends_on_it(clone: Path):
    output = run(clone, "dvc", "exp", "run", "--name", "second", "-S", "kd.beta=0.9")
    again = ran(output)
    assert again[:3] == ["distill", "prune", "train_branchynet"]
    assert set(again) == set(STAGES) - {"download", "train_teacher"}
    first, second = parents(clone)
    assert (first.data.params["kd.beta"], second.data.params["kd.beta"]) == ("0.5", "0.9")
    changed = {k for k in first.data.params if first.data.params[k] != second.data.params[k]}
    assert changed == {"kd.beta"}
    assert first.data.metrics.keys() == second.data.metrics.keys()
    assert first.data.metrics != second.data.metrics
    # The stages that were not run again are linked to the runs that made them.
    old = children(clone, first.info.run_id)
    linked = {k: v for k, v in second.data.tags.items() if k.startswith("edgeke.restored.")}
    assert linked == {
        f"edgeke.restored.{stage}": old[stage].info.run_id
        for stage in ("download", "train_teacher")
    }


def test_restored_stages_are_not_run_and_the_parent_links_their_runs(clone: Path):
    output = run(clone, "dvc", "exp", "run", "--name", "third", "-S", "kd.beta=0.5")
    assert ran(output) == ["evaluate"]
    assert output.count("is cached - skipping run") == 5
    first, _, third = parents(clone)
    assert third.data.params == first.data.params
    assert third.data.tags["DVC_EXP_NAME"] == "third"
    old = children(clone, first.info.run_id)
    linked = {k: v for k, v in third.data.tags.items() if k.startswith("edgeke.restored.")}
    assert linked == {
        f"edgeke.restored.{stage}": old[stage].info.run_id
        for stage in STAGES
        if stage != "evaluate"
    }
    accuracy = "test/default/accuracy"
    assert third.data.metrics[accuracy] == first.data.metrics[accuracy]


def test_the_readmes_code_runs_where_only_the_device_packages_are_used(clone: Path):
    block = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    last = run(clone, "python", "-c", block).splitlines()[-1]
    label, exit = last.split(" from exit ")
    assert label in "0123456789"
    assert exit in "0123"


def test_the_lock_check_sees_other_parameters_and_other_code(clone: Path):
    assert run(clone, "scripts/lock-check") == ""
    file = clone / "edgeke" / "calibrate.py"
    before = file.read_text()
    file.write_text(before + "\n# changed\n")
    output = run(clone, "scripts/lock-check", check=False)
    file.write_text(before)
    assert "calibrate: changed deps: edgeke/calibrate.py" in output
    params = clone / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("points: 30", "points: 20"))
    output = run(clone, "scripts/lock-check", check=False)
    params.write_text(before)
    assert "run `dvc repro`" in output
    assert "calibrate: changed deps: params.yaml" in output


def test_an_image_more_runs_download_again(clone: Path):
    extra = clone / "data" / "source" / "extra.png"
    extra.write_bytes(b"any change of the folder counts")
    status = json.loads(run(clone, "dvc", "status", "--json", "download"))
    extra.unlink()
    assert status["download"] == [{"changed deps": {"data/source": "modified"}}]
    assert json.loads(run(clone, "dvc", "status", "--json", "download")) == {}
