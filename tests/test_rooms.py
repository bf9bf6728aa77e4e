"""The rooms: who may import whom, what is public, what a device needs."""

import ast
import importlib
import pkgutil

import pytest
from imports import imported, modules, reached
from toys import ROOT

import edgeke

STAGES = {
    "download", "train_teacher", "distill", "train_branchynet", "export", "calibrate", "evaluate",
}  # fmt: skip
ROOMS = {
    # params checks lengths against layouts and orders, whose modules have no torch.
    "params": {"errors", "learning", "networks", "entries", "remote", "schema"},
    "entries": {"schema"},
    "schema": {"errors"},
    "tracking": {"errors", "files", "params", "device"},
    "compare": {"errors", "files", "params", "tracking"},
    "files": {"errors"},
    "errors": set(),
    "bundle": {"errors", "files"},
    "promote": {"errors", "params", "tracking"},
    "remote": {"errors"},
    # Trains without DVC through the corridor's own functions; nothing imports it.
    "campaign": {
        "errors",
        "files",
        "params",
        "data",
        "networks",
        "learning",
        "policy",
        "graph",
        "device",
        "train_teacher",
        "distill",
        "train_branchynet",
    },
    "data": {"errors", "files", "params"},
    "networks": {"errors"},
    "learning": {"errors", "files", "params", "data", "networks"},
    "policy": {"errors", "files", "params", "device", "entries"},
    "graph": {"errors", "files", "params", "device", "networks"},
    "device": set(),
}


def room(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


@pytest.mark.parametrize("module", sorted(modules("edgeke")))
def test_arrows_point_one_way(module):
    own = room(module)
    targets = {room(m) for m in imported(module) if m.startswith("edgeke.")} - {own}
    assert not any(m.startswith("stages") for m in imported(module)), "nothing imports a stage"
    if own in STAGES:
        assert not targets & STAGES, "the corridor's modules do not import each other"
    elif own:
        assert targets <= ROOMS[own]


@pytest.mark.parametrize("start", ["edgeke.policy", "edgeke.device"])
def test_policy_and_device_never_reach_torch(start):
    for module in modules(start):
        for found in reached(module):
            assert "torch" not in {name.split(".")[0] for name in imported(found)}, found


def test_every_room_and_stage_is_known():
    found = {name.name for name in pkgutil.iter_modules(edgeke.__path__)}
    assert found == set(ROOMS) | STAGES
    entries = {path.stem for path in (ROOT / "stages").glob("[a-z]*.py")}
    assert entries == STAGES
    for stage in STAGES:
        assert (ROOT / "tests" / f"test_{stage}.py").is_file()


@pytest.mark.filterwarnings("ignore:::mlflow")  # advice to the model that it serves
@pytest.mark.parametrize("module", sorted(modules("edgeke")))
def test_all_names_exactly_what_is_public(module):
    tree = ast.parse(modules("edgeke")[module].read_text())
    defined = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
    public = {name for name in defined if not name.startswith("_")}
    if modules("edgeke")[module].name == "__init__.py":
        return
    loaded = importlib.import_module(module)
    aliases = {"Floats", "Integers"}  # short names for array types
    assert sorted(loaded.__all__) == sorted(public - aliases)


@pytest.mark.parametrize("module", sorted(modules("edgeke")))
def test_public_names_say_what_they_do(module):
    tree = ast.parse(modules("edgeke")[module].read_text())
    assert ast.get_docstring(tree), "a module opens with what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("module", sorted(modules("edgeke")))
def test_modules_stay_small(module):
    assert len(modules("edgeke")[module].read_text().splitlines()) <= 400


@pytest.mark.parametrize("entry", sorted((ROOT / "stages").glob("*.py")), ids=lambda p: p.stem)
def test_stage_entries_stay_thin(entry):
    assert len(entry.read_text().splitlines()) <= 80


def test_nothing_reads_pickles():
    for package in ("edgeke", "stages"):
        for name, path in modules(package).items():
            text = path.read_text()
            for word in ("pickle", "torch.load", "joblib", "yaml.load", "allow_pickle"):
                assert word not in text, (name, word)
