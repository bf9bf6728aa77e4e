import copy
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
    for name in content["profiles"]:
        parsed = params.parse({**content, "profile": name})
        assert parsed.profile_name == name
        assert parsed.augmentation.crop_padding == parsed.profile.augmentation.crop_padding


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("kd.beta", 1.5, ["kd.beta = 1.5", "less than or equal to 1"]),
        ("augmentation.cutout", 16, ["augmentation.cutout = 16", "use a smaller square"]),
        ("kd.beta", True, ["kd.beta = true", "number"]),
        ("kd.beta", float("nan"), ["kd.beta = NaN", "finite"]),
        ("kd.beta", 10**400, ["kd.beta = 1000", "...", "number"]),
        ("kd.temperature", 0, ["kd.temperature = 0", "greater than 0"]),
        ("kd.temperature", 1e300, ["kd.temperature = 1e+300", "1000"]),
        ("kd.distance", "euclid", ['kd.distance = "euclid"', "'kl', 'js', 'wasserstein'"]),
        ("kd.bata", 0.5, ["unknown key `kd.bata` = 0.5", "did you mean `beta`"]),
        ("kd", 3, ["kd = 3", "section"]),
        ("seed", 1.5, ["seed = 1.5", "integer"]),
        ("seed", 2**31, ["seed = 2147483648", "less than 2147483648"]),
        ("profile", "digit", ["profile = 'digit'", "digits, tiny"]),
        ("profile_name", "x", ["unknown key `profile_name`"]),
        ("branchynet.codec", {"after": 0, "codec": "q5"}, ["branchynet.codec.codec", "q5"]),
        ("branchynet.codec", {"after": 0, "codec": "f32"}, ["branchynet.codec", "such as q4"]),
        ("branchynet.codec", {"after": 2, "codec": "q4"}, ["after = 2", "others behind it is 1"]),
        ("branchynet.codec", "q4", ["branchynet.codec", "section"]),
        ("branchynet.layout", "paper", ["layout 'paper' is unknown", "edgeke, stages"]),
        ("branchynet.layout", [], ["branchynet.layout"]),
        ("branchynet.layout", [0.5, 0.5], ["two exits to 0.5"]),
        ("branchynet.layout", [{"attach": "layer1.0"}], ["branchynet.layout[0].kind", "missing"]),
        (
            "branchynet.layout",
            [0.5, {"attach": 0.2, "kind": "linear"}],
            ["branchynet.layout = [0.5, 0.2]", "smaller shares first"],
        ),
        ("branchynet.layout", [0.5, 2], ["branchynet.layout"]),
        ("profiles.tiny.student.network", "timm/resnet18", ["width = 8", "remove the key"]),
        ("profiles.tiny.student.stem", "small", ["only timm's networks"]),
        (
            "profiles.tiny.teacher.network",
            "resnet19",
            ["profiles.tiny.teacher: network 'resnet19'", "did you mean resnet18"],
        ),
        (
            "branchynet.layout",
            [{"attach": "stem", "kind": "x"}],
            ["branchynet.layout[0]: exit kind 'x'", "use one of branch"],
        ),
        ("student.prune", {"macs": 1, "max_loss": 0.01}, ["student.prune.macs = 1", "less than 1"]),
        ("student.prune", {"macs": 0.5, "max_loss": -1}, ["student.prune.max_loss = -1"]),
        ("student.prune", {"macs": 0.5}, ["student.prune.max_loss", "missing"]),
        ("optimisation.weight_decay", 1e300, ["optimisation.weight_decay = 1e+300"]),
        ("optimisation.milestones", [0.5, 0], ["optimisation.milestones[1] = 0", "than 0"]),
        ("augmentation.crop_padding", 1, ["unknown key `augmentation.crop_padding`", "cutout"]),
        ("augmentation.cutout", 10**30, ["augmentation.cutout", "1024"]),
        ("calibrate.proportions", {"of_all": [0.5, 0.5]}, ["2 shares", "3 exits"]),
        ("calibrate.proportions", {"of_all": [0.5, 0.6, 0]}, ["of_all", "at most 1"]),
        ("calibrate.proportions", {}, ["calibrate.proportions = {}", "of_reaching"]),
        (
            "calibrate.requirements",
            [{"max_degradation": 0.1, "max_cost": 0.5}],
            ['{"max_degradation": 0.1, "max_cost": 0.5}', "one of max_cost"],
        ),
        ("calibrate.votes", [0.3, 0.7], ["calibrate.votes = [0.3, 0.7]", "3 exits"]),
        ("calibrate.votes", [0, 0, 0], ["not all 0"]),
        ("calibrate.requirements", [{"min_accuracy": 97}], ["requirements[0].min_accuracy = 97"]),
        ("calibrate.requirements", [{"max_degradation": 0.1}] * 2, ["each entry once"]),
        ("evaluate.device", "board", ["evaluate.device = 'board'", "ssh://user@host"]),
        ("evaluate.threads", [], ["evaluate.threads", "at least one"]),
        ("evaluate.threads", [10**10], ["evaluate.threads[0] = 10000000000", "1024"]),
        ("tracking.enabled", "yes", ["tracking.enabled", "true or false"]),
        ("tracking.experiment", "Ada's", ["tracking.experiment", "without / :"]),
        ("profiles.tiny.data.image_size", 12, ["image_size = 12", "multiple of 8"]),
        ("profiles.tiny.data.image_size", [16, 20], ["image_size[1] = 20", "multiple of 8"]),
        ("profiles.tiny.data.fit", "resize", ['fit = "resize"', "'crop', 'pad', 'stretch'"]),
        ("data.group", {"folder": 0}, ["data.group.folder = 0"]),
        ("data.group", {"pattern": "(part"}, ["data.group", "regular expression"]),
        ("data.group", {"folder": 1, "pattern": "x"}, ["data.group", "one of {folder: 1}"]),
        ("data.max_megapixels", 0, ["data.max_megapixels = 0"]),
        ("profiles.tiny.data.test", 1.2, ["profiles.tiny.data.test = 1.2", "share"]),
        (
            "profiles.tiny.augmentation.crop_padding",
            16,
            ["augmentation.crop_padding = 16", "side, 16"],
        ),
        (
            "profiles.tiny.student",
            {"network": "timm/resnet18", "trunk": "frozen"},
            ["timm/resnet18 has trunk: frozen and no weights", "weights: pretrained"],
        ),
        ("profiles.tiny.recipes.distill.learning_rate", 1e300, ["learning_rate = 1e+300"]),
        ("profiles.tiny.recipes.batch_size", 10**9, ["batch_size", "65536"]),
        ("profiles.digits.recipes.train_branchynet.epochs", [3], ["epochs = [3]", "2 phases"]),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_remedy(content, key, value, words):
    with pytest.raises(InputError) as caught:
        params.parse(put(content, key, value))
    for word in words:
        assert word in str(caught.value)


def test_a_typo_in_a_profile_that_is_not_chosen_is_reported(content):
    content["profiles"]["cifar10"]["techer"] = content["profiles"]["cifar10"].pop("teacher")
    with pytest.raises(InputError, match=r"profiles\.cifar10\.techer.*did you mean `teacher`"):
        params.parse(content)


def test_a_codec_needs_a_shared_trunk_and_a_phase_of_its_own(content):
    put(content, "branchynet.codec", {"after": 0, "codec": "q2"})
    params.parse(content)
    epochs = "profiles.digits.recipes.train_branchynet.epochs"
    with pytest.raises(InputError, match="with a codec, has 3 phases"):
        params.parse(put(copy.deepcopy(content), epochs, [8, 8]))
    params.parse(put(copy.deepcopy(content), epochs, [8, 8, 4]))
    with pytest.raises(InputError, match="order is independent"):
        params.parse(put(content, "branchynet.order", "independent"))


def test_a_profile_whose_name_dvc_would_split_is_refused(content):
    content["profiles"]["my.profile"] = content["profiles"]["tiny"]
    with pytest.raises(InputError, match=r"my\.profile.*letters, digits"):
        params.parse(content)


def test_a_missing_key_is_named(content):
    del content["kd"]["temperature"]
    with pytest.raises(InputError, match=r"key `kd\.temperature` is missing"):
        params.parse(content)


@pytest.mark.parametrize("order", ["independent", "asynchronous_back"])
def test_the_main_exit_cannot_supervise_where_it_is_not_there(content, order):
    put(content, "branchynet.order", order)
    with pytest.raises(InputError, match=rf"kd\.source = main.*order {order}.*source=teacher"):
        params.parse(put(content, "kd.source", "main"))


def test_only_a_main_branch_that_is_trained_first_can_be_pruned(content):
    put(content, "student.prune", {"macs": 0.5, "max_loss": 0.01})
    for order in ("independent", "synchronous", "asynchronous_back"):
        put(content, "branchynet.order", order)
        with pytest.raises(InputError, match=rf"student\.prune .*order {order} does not start fr"):
            params.parse(content)
    put(content, "branchynet.order", "mixed")
    assert params.parse(content).student.prune.macs == 0.5
    put(content, "profile", "steel")
    with pytest.raises(InputError, match=r"student\.prune .*steel\.student has trunk: frozen; use"):
        params.parse(content)


@pytest.mark.parametrize(
    ("layout", "exits"),
    [
        ("edgeke", 3),
        ("stages", 4),
        ([0.1, 0.25, 0.5], 4),
        ([{"attach": "layer1.1", "kind": "linear"}], 2),
    ],
)
def test_a_layout_demands_no_other_change(content, layout, exits):
    parsed = params.parse(put(content, "branchynet.layout", layout))
    weights, shares = parsed.branchynet.weights(exits), parsed.calibrate.shares(exits)
    assert sum(weights) == pytest.approx(1)
    assert weights[-1] == 0.6
    assert shares == (*[0.5] * (exits - 1), 1.0)


def test_published_proportions_mean_shares_of_all_images(content):
    put(content, "calibrate.proportions", {"of_all": [0.9, 0.05, 0.05]})
    assert params.parse(content).calibrate.shares(3) == pytest.approx((0.9, 0.5, 1.0))
    put(content, "calibrate.proportions", {"of_reaching": [0.5, 0.5, 0.9]})
    assert params.parse(content).calibrate.shares(3) == (0.5, 0.5, 0.9)


def test_requirements_have_names_for_metrics(content):
    requirements = [
        {"max_degradation": 0.03, "delta": 0.1},
        {"min_accuracy": 0.97},
        {"max_cost": 1},
    ]
    parsed = params.parse(put(content, "calibrate.requirements", requirements))
    names = [requirement.name for requirement in parsed.calibrate.requirements]
    assert names == ["max_degradation_0.03_delta_0.1", "min_accuracy_0.97", "max_cost_1"]
    assert [r.bound for r in parsed.calibrate.requirements] == [0.03, 0.97, 1.0]


def test_flatten_names_every_value_once(content):
    layout = [{"attach": "layer1.1", "kind": "linear"}, {"attach": "layer2.1", "kind": "attention"}]
    flat = flatten(params.parse(put(content, "branchynet.layout", layout)))
    assert flat["kd.beta"] == str(content["kd"]["beta"])
    assert flat["profile"] == "digits"
    assert flat["student.width"] == "16"
    assert flat["augmentation.flip"] == "False"
    assert flat["branchynet.layout"] == "layer1.1:linear, layer2.1:attention"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("kd:", "kd: [", "cannot be read as YAML"),
        ("seed: 0", "seed: 0\nseed: 1", 'duplicate key "seed"'),
        ("seed: 0", "seed: 1:30", 'seed = "1:30"'),  # 90 in YAML 1.1, text for DVC
        ("seed: 0", f"seed: {'9' * 5000}", "cannot be read as YAML"),
        ("beta: 0.5", f"beta: {'[' * 5000}", "cannot be read as YAML"),
        ("beta: 0.5", "beta: &a [*a]", "kd.beta"),
        ("beta: 0.5", "beta: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("beta: 0.5", "beta: !!int", "cannot be read as YAML"),
        ("beta: 0.5", "beta: \ud800", "cannot be read as YAML"),
    ],
)
def test_a_broken_file_is_refused_in_words(tmp_path: Path, old, new, words):
    text = (ROOT / "params.yaml").read_text().replace(old, new, 1)
    (tmp_path / "params.yaml").write_bytes(text.encode("utf-8", errors="surrogatepass"))
    with pytest.raises(InputError) as caught:
        params.load(tmp_path / "params.yaml")
    assert words in str(caught.value)


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path):
    text = (ROOT / "params.yaml").read_text().replace("seed: 0", "seed: 010")
    (tmp_path / "params.yaml").write_text(text.replace("beta: 0.5", "beta: 1e-4"))
    parsed = params.load(tmp_path / "params.yaml")
    assert (parsed.seed, parsed.kd.beta) == (10, 1e-4)
    assert isinstance(parsed.kd.temperature, float)


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
