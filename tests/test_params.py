import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toys import ROOT

from edgeke import params
from edgeke.errors import InputError
from edgeke.tracking.state import flatten


@pytest.fixture
def content() -> dict:
    return copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))


def put(content: dict, key: str, value: object) -> dict:
    *front, last = key.split(".")
    section = content
    for part in front:
        section = section[part]
    section[last] = value
    return content


def test_the_projects_own_parameters_are_valid_for_every_profile(content):
    known = {"digits", "tiny", "cifar100", "cifar100_small", "cifar10", "image_folder"}
    assert set(content["profiles"]) == known
    for name in content["profiles"]:
        parsed = params.parse({**content, "profile": name})
        assert parsed.profile_name == name
        assert parsed.profile.data.source in ("digits", "cifar100", "cifar10", "image_folder")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("kd.beta", 1.5, ["kd.beta", "1.5", "between 0"]),
        ("kd.beta", "much", ["kd.beta", "'much'", "float"]),
        ("kd.beta", True, ["kd.beta", "True", "float"]),
        ("kd.beta", float("nan"), ["kd.beta", "nan"]),
        ("kd.temperature", 0, ["kd.temperature", "0.0", "above 0"]),
        (
            "kd.distance",
            "euclid",
            ["kd.distance", "'euclid'", "kl, js, wasserstein, wasserstein_classes, dkd"],
        ),
        ("kd.bata", 0.5, ["unknown key `kd.bata`", "did you mean `beta`"]),
        ("kd", 3, ["kd = 3", "section"]),
        ("seed", 1.5, ["seed", "1.5", "int"]),
        ("seed", -1, ["seed", "-1", "0 to 2147483647"]),
        ("profile", "digit", ["profile = 'digit'", "digits, tiny"]),
        ("branchynet.layout", "paper", ["layout 'paper' is unknown", "edgeke, stages"]),
        ("branchynet.layout", "stages", ["distill.branches", "-S 'distill.branches=[0,1,2,3]'"]),
        (
            "branchynet.layout",
            [{"attach": "layer9.0", "kind": "linear"}],
            ["layer9.0", "attach it to one of stem, layer1.0"],
        ),
        (
            "branchynet.layout",
            [{"attach": "layer3.0", "kind": "linear"}, {"attach": "layer1.0", "kind": "linear"}],
            ["shallow to deep"],
        ),
        ("branchynet.layout", [{"attach": "layer1.0"}], ["branchynet.layout[0].kind", "missing"]),
        ("branchynet.weights", [0.5, 0.5], ["branchynet.weights", "3 exits"]),
        ("branchynet.weights", [0, 0, 0], ["branchynet.weights", "not all 0"]),
        ("kd.source", "student", ["kd.source", "teacher, main, both"]),
        ("profiles.digits.data.image_size", 12, ["image_size", "multiple of 8"]),
        ("profiles.digits.recipes.distill.ema", 1.0, ["recipes.distill.ema", "0.999"]),
        ("branchynet.order", "backwards", ["branchynet.order", "asynchronous"]),
        ("distill.branches", [0, 1], ["distill.branches", "starts from branch 2", "-S 'distill"]),
        ("distill.branches", [0, 2, 5], ["distill.branches", "[0, 2, 5]", "[0,1,2]"]),
        ("distill.branches", [2, 2], ["distill.branches", "[2, 2]", "once"]),
        ("distill.branches", 2, ["distill.branches = 2", "list"]),
        ("calibrate.proportions", [0.5, 0.5], ["calibrate.proportions", "3 exits"]),
        ("calibrate.proportions", [0.5, 0.5, 2], ["calibrate.proportions", "between 0 and 1"]),
        ("calibrate.score", "luck", ["calibrate.score", "best, max_probability, margin"]),
        ("calibrate.delta", 1, ["calibrate.delta", "1.0", "between 0 and 1"]),
        ("calibrate.cost_step", 0, ["calibrate.cost_step", "0.05"]),
        ("calibrate.requirements", [{}], ["requirements[0].max_cost", "exactly one"]),
        (
            "calibrate.requirements",
            [{"max_degradation": 0.1, "max_cost": 0.5}],
            ["requirements[0]", "exactly one of max_cost, min_accuracy and max_degradation"],
        ),
        (
            "calibrate.requirements",
            [{"max_degradation": 2}],
            ["requirements[0].max_degradation = 2.0", "between"],
        ),
        ("calibrate.requirements", [{"min_accuracy": 97}], ["requirements[0].min_accuracy"]),
        ("calibrate.requirements", [{"max_cost": 0}], ["requirements[0].max_cost", "above 0"]),
        (
            "calibrate.requirements",
            [{"max_degradation": 0.1, "delta": 0}],
            ["requirements[0].delta", "between 0 and 1"],
        ),
        (
            "calibrate.requirements",
            [{"max_cost": 0.9, "delta": 0.2}],
            ["requirements[0].delta", "set that"],
        ),
        (
            "calibrate.requirements",
            [{"max_los": 0.1}],
            ["max_los", "did you mean `max_degradation`"],
        ),
        ("calibrate.requirements", [{"max_degradation": 0.1}] * 2, ["list each requirement once"]),
        ("branchynet.layout", [], ["branchynet.layout"]),
        ("evaluate.device", "board", ["evaluate.device = 'board'", "ssh://user@host"]),
        ("evaluate.device", "ssh://board:port", ["evaluate.device", "ssh://user@host"]),
        ("evaluate.deadline_ms", 0, ["evaluate.deadline_ms", "above 0"]),
        ("evaluate.threads", [], ["evaluate.threads", "each once"]),
        ("evaluate.threads", [1, 10**10], ["evaluate.threads", "each once"]),
        ("profiles.tiny.teacher.width", 0, ["profiles.tiny.teacher.width", "0"]),
        ("profiles.tiny.data.test", 1.2, ["profiles.tiny.data.test", "1.2", "share"]),
        ("profiles.tiny.recipes.distill.epochs", 0, ["profiles.tiny.recipes.distill.epochs"]),
        ("tracking.enabled", "yes", ["tracking.enabled", "bool"]),
        ("profile_name", "x", ["unknown key `profile_name`"]),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_remedy(content, key, value, words):
    with pytest.raises(InputError) as caught:
        params.parse(put(content, key, value))
    for word in words:
        assert word in str(caught.value)


def test_a_layout_may_be_a_list(content):
    own = [{"attach": "layer1.1", "kind": "linear"}, {"attach": "layer2.1", "kind": "attention"}]
    parsed = params.parse(put(content, "branchynet.layout", own))
    assert [(e.attach, e.kind) for e in parsed.branchynet.layout] == [
        ("layer1.1", "linear"),
        ("layer2.1", "attention"),
    ]
    assert flatten(parsed)["branchynet.layout"] == "layer1.1:linear, layer2.1:attention"


def test_requirements_have_names_for_metrics(content):
    asked = [{"max_degradation": 0.03, "delta": 0.1}, {"min_accuracy": 0.97}, {"max_cost": 1}]
    parsed = params.parse(put(content, "calibrate.requirements", asked))
    names = [of.name for of in parsed.calibrate.requirements]
    assert names == ["max_degradation_0.03_delta_0.1", "min_accuracy_0.97", "max_cost_1"]
    assert flatten(parsed)["calibrate.requirements"] == ", ".join(names)
    assert [of.bound for of in parsed.calibrate.requirements] == [0.03, 0.97, 1.0]


@pytest.mark.parametrize("order", ["independent", "asynchronous_back"])
def test_the_main_exit_cannot_supervise_where_it_is_not_there(content, order):
    put(content, "branchynet.order", order)
    with pytest.raises(InputError, match=rf"kd\.source = 'main'.*order {order}.*source=teacher"):
        params.parse(put(content, "kd.source", "main"))


def test_a_missing_key_is_named(content):
    del content["kd"]["temperature"]
    with pytest.raises(InputError, match=r"key `kd\.temperature` is missing"):
        params.parse(content)


def test_a_typo_in_a_profile_that_is_not_chosen_is_found(content):
    content["profiles"]["cifar10"]["techer"] = content["profiles"]["cifar10"].pop("teacher")
    with pytest.raises(InputError, match=r"profiles\.cifar10\.techer.*did you mean `teacher`"):
        params.parse(content)


def test_numbers_are_read_as_dvc_reads_them(content):
    put(content, "export.parity_tolerance", "1e-4")  # PyYAML's reading of a bare 1e-4
    put(content, "kd.temperature", 4)
    parsed = params.parse(content)
    assert parsed.export.parity_tolerance == 1e-4
    assert isinstance(parsed.kd.temperature, float)


def test_missing_and_broken_files_say_what_to_do(tmp_path: Path):
    with pytest.raises(InputError, match="repository's root"):
        params.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("kd: [")
    with pytest.raises(InputError, match="not valid YAML"):
        params.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("just text")
    with pytest.raises(InputError, match="must hold sections"):
        params.load(tmp_path / "params.yaml")


def test_no_field_has_a_default_so_every_value_is_one_that_dvc_sees():
    for name in params.__all__:
        kind = getattr(params, name)
        if dataclasses.is_dataclass(kind):
            for field in dataclasses.fields(kind):
                assert field.default is dataclasses.MISSING, f"{name}.{field.name}"
                assert field.default_factory is dataclasses.MISSING, f"{name}.{field.name}"


def test_flatten_names_every_value_once(content):
    flat = flatten(params.parse(content))
    assert flat["kd.beta"] == content["kd"]["beta"]
    assert flat["profile"] == "digits"
    assert flat["student.width"] == 16
    assert flat["augmentation.flip"] is False
    assert flat["branchynet.weights"] == "0.2, 0.2, 0.6"


def test_a_stage_prints_one_line_and_starts_no_work(content, tmp_path: Path):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(put(content, "kd.beta", 7)))
    done = subprocess.run(
        [sys.executable, "-m", "stages.train_teacher"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: params.yaml: kd.beta = 7")
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["params.yaml"]
