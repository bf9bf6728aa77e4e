"""Which package may import which, what a device needs, and what dvc.yaml must list."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from toys import ROOT

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = tuple(PIPELINE["stages"])
# What each package or module below edgeke/ may import of the others, besides errors.
ALLOWED = {
    "bundle": {"files"},
    "cluster": {"device", "files", "serving"},  # `cluster serve` is a server's application
    "compare": {"files", "params", "tracking"},
    "data": {"device", "files", "params"},  # pictures are decoded as on the device
    "device": set(),
    "errors": set(),
    "files": set(),
    "graph": {"device", "files", "networks", "params"},
    "learning": {"data", "device", "files", "networks", "params"},
    "networks": set(),
    "params": {"learning", "networks", "remote"},  # orders and layouts, whose modules have no torch
    "policy": {"device", "files", "params"},
    "promote": {"params", "tracking"},
    "remote": set(),
    "serving": {"device"},
    "tracking": {"bundle", "device", "files", "params"},
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("edgeke", "stages")
    for path in (ROOT / folder).rglob("*.py")
}


@cache
def imports(module: str) -> frozenset[str]:
    """What a module imports anywhere, but for type checking alone, as full names."""
    tree = ast.parse(MODULES[module].read_text())
    names, typing = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing |= set(ast.walk(node))
        if node not in typing and isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if node not in typing and isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in full}
    return frozenset(names)


def reached(module: str, ignored: tuple[str, ...] = ()) -> set[str]:
    """Everything that importing a module runs, except through ignored modules."""
    todo, known = [module], set()
    while todo:
        name = todo.pop()
        if name not in known and not name.startswith(ignored or "-"):
            known.add(name)
            todo += imports(name) if name in MODULES else ()
    return known


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("edgeke.")))
def test_imports_go_one_way(module):
    package = module.split(".")[1]
    others = {name.split(".")[1] for name in imports(module) if name.startswith("edgeke.")}
    assert not any(name.startswith("stages") for name in imports(module))
    if package in STAGES:
        assert not (others - {package}) & set(STAGES), "stages' modules do not import each other"
    else:
        assert others <= {package, "errors"} | ALLOWED[package]


def test_policy_and_device_run_without_torch():
    for module in MODULES:
        if module.startswith(
            ("edgeke.policy", "edgeke.device", "edgeke.serving", "edgeke.cluster")
        ):
            assert "torch" not in {name.split(".")[0] for name in reached(module)}, module


def test_nothing_reads_pickles():
    for module, path in MODULES.items():
        text = path.read_text()
        if module == "edgeke.networks.weights":  # a pip package has its weights as .pth alone
            text = re.sub(r"torch\.load\([^)]*weights_only=True\)", "", text, count=1)
        for word in ("pickle", "torch.load", "joblib", "yaml.load", "allow_pickle=True"):
            assert word not in text, (module, word)


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_lists_the_parameters_that_a_stage_reads(stage):
    read = set(re.findall(r"params\.([\w.]+)", (ROOT / "stages" / f"{stage}.py").read_text()))
    listed = PIPELINE["stages"][stage]["params"]
    listed = [name.replace("profiles.${profile}", "profile") for name in listed]
    if "plan" in read:
        assert {"seed", "training", "optimisation", "augmentation"} <= set(listed)
        named = {"augmentation", "recipes.batch_size", "recipes.warmup"}
        assert {f"profile.{name}" for name in named} <= set(listed)
    for name in read - {"plan", "profile_name", "data.path"}:
        assert any(f"{name}.".startswith(f"{section}.") for section in listed), name


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_lists_the_packages_that_a_stage_imports(stage):
    # What decodes pictures is download's: the other stages read its file.
    deps = [Path(dep) for name in {stage, "download"} for dep in PIPELINE["stages"][name]["deps"]]
    # Values come through `params`, reports change no artefact, errors and files hold no method.
    ignored = ("stages._entry", "stages._inputs", "edgeke.params", "edgeke.tracking")
    ignored += ("edgeke.errors", "edgeke.files")
    for module in reached(f"stages.{stage}", ignored) & set(MODULES) - {"edgeke"}:
        path = MODULES[module].relative_to(ROOT)
        assert any(path.is_relative_to(dep) for dep in deps), path


@pytest.mark.parametrize(
    ("stage", "splits"),
    [
        ("train_teacher", {"train", "validation"}),
        ("distill", {"train", "validation"}),
        ("train_branchynet", {"train", "validation"}),
        ("export", {"train", "validation"}),
        ("calibrate", {"validation", "calibration"}),
        ("evaluate", {"test"}),
    ],
)
def test_each_stage_reads_only_its_splits(stage, splits):
    assert "load_dataset" not in (ROOT / "edgeke" / f"{stage}.py").read_text()
    for node in ast.walk(ast.parse((ROOT / "stages" / f"{stage}.py").read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "load_dataset":
            assert set(ast.literal_eval(node.args[1])) == splits
