"""dvc.yaml against the code: deps are what a stage imports, params what its entry reads."""

import ast
from pathlib import Path

import pytest
import yaml
from imports import modules, reached
from toys import ROOT

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = {name: stage.get("do", stage) for name, stage in PIPELINE["stages"].items()}
# Values come through `params:`, reports go to MLflow: neither changes an artefact.
IGNORED = frozenset({"edgeke.params", "stages._entry", "stages", *modules("edgeke.tracking")})
# `python -m edgeke.device.measure` runs as a process of its own.
STARTED = {"evaluate": {"edgeke.device.measure"}}


def files_of(dep: str) -> set[Path]:
    path = ROOT / dep
    return set(path.rglob("*.py")) if path.is_dir() else {path}


@pytest.mark.parametrize("name", STAGES)
def test_deps_equal_the_import_graph(name):
    known = {**modules("edgeke"), **modules("stages")}
    wanted = reached(f"stages.{name}", IGNORED)
    for started in STARTED.get(name, set()):
        wanted |= reached(started, IGNORED)
    expected = {known[module] for module in wanted}
    code = [dep for dep in STAGES[name]["deps"] if dep.startswith(("edgeke/", "stages/"))]
    listed = set().union(*map(files_of, code))
    relative = lambda paths: sorted(str(p.relative_to(ROOT)) for p in paths)  # noqa: E731
    assert relative(expected - listed) == [], "imported, but no dep: its changes would go unseen"
    assert relative(listed - expected) == [], "a dep, but not imported: it re-runs for nothing"


@pytest.mark.parametrize("name", STAGES)
def test_params_equal_what_the_entry_reads(name):
    listed = {p.replace("profiles.${profile}.", "profile.") for p in STAGES[name]["params"]}
    listed = {"profile_name" if p == "profile" else p for p in listed}
    read = attribute_chains(ROOT / "stages" / f"{name}.py")
    # The folder's content is a dep, and with it its path.
    read -= {"data.path"}
    uncovered = {r for r in read if not any(f"{r}.".startswith(f"{p}.") for p in listed)}
    assert uncovered == set(), "read, but not tracked by DVC"
    unused = {p for p in listed if not any(f"{r}.".startswith(f"{p}.") for r in read)}
    assert unused == set(), "tracked, but never read"


def attribute_chains(path: Path) -> set[str]:
    """The longest `params.a.b.c` chains in a stage entry, without `params`.

    A chain through a name (`network = params.profile.student`) counts as its whole section.
    """
    chains = set()
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if text.startswith("params."):
            chains.add(text.removeprefix("params."))
    return {c for c in chains if not any(other.startswith(f"{c}.") for other in chains)}


def test_every_stage_writes_its_metrics_and_run_and_is_run_as_a_module():
    for name, stage in STAGES.items():
        item = "/${item}" if name == "distill" else ""
        assert stage["cmd"] == f"python -m stages.{name}" + (" ${item}" if item else "")
        assert stage["metrics"] == [{f"results/{name}{item}/metrics.json": {"cache": False}}]
        outs = {out if isinstance(out, str) else next(iter(out)) for out in stage["outs"]}
        assert f"results/{name}{item}/run.json" in outs


def test_dvc_can_restore_every_stage_but_the_last_from_its_run_cache():
    """An uncached out that is no metric would keep its stage from the run cache."""
    for name, stage in STAGES.items():
        flagged = [out for out in stage["outs"] if not isinstance(out, str)]
        assert flagged == (
            [{"results/evaluate/run.json": {"persist": True}}] * (name == "evaluate")
        )


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("train_teacher", {"train", "validation"}),
        ("distill", {"train", "validation"}),
        ("train_branchynet", {"train", "validation"}),
        ("export", {"train"}),
        ("calibrate", {"validation", "calibration"}),
        ("evaluate", {"test"}),
    ],
)
def test_no_stage_looks_at_a_split_before_its_turn(name, allowed):
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / "stages" / f"{name}.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "load_dataset"
    ]
    assert len(calls) == 1
    assert set(ast.literal_eval(calls[0].args[1])) <= allowed
    # load_dataset reads no other split, and no other function reads the file.
    source = modules(f"edgeke.{name}")[f"edgeke.{name}"].read_text()
    assert "load_dataset" not in source
    assert "safe_open" not in source


def test_plots_name_files_that_stages_write():
    written = {
        (out if isinstance(out, str) else next(iter(out)))
        for stage in STAGES.values()
        for out in stage["outs"]
    }
    written |= {out.replace("${item}", item) for out in written for item in "012"}
    for plot in PIPELINE["plots"]:
        for settings in plot.values():
            assert set(settings["y"]) <= written
            template = settings.get("template")
            assert template is None or (ROOT / ".dvc" / "plots" / f"{template}.json").is_file()
