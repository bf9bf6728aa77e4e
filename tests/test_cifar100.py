"""scripts/cifar100: rehearsed on the CPU, killed and resumed, and brought home."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bundles import build
from PIL import Image
from toys import ROOT, SIZE, randomise

from edgeke.campaign.bring_home import write_summary
from edgeke.campaign.pieces import LIMIT, read_network, read_pieces, write_network, write_pieces
from edgeke.campaign.published import STEP, THRESHOLDS, compare_with_published
from edgeke.campaign.record import Record
from edgeke.campaign.settings import PREPARED, Settings, campaign_content, prepare
from edgeke.campaign.steps import Costs, asked_epochs, make_steps, schedule
from edgeke.campaign.strips import build_dataset, cut_splits, read_strips
from edgeke.campaign.summary import HEADLINE as SUMMARY
from edgeke.campaign.summary import model_card
from edgeke.data.augment import Normalise
from edgeke.data.dataset import load_dataset, save_dataset
from edgeke.device.classifier import Classifier
from edgeke.download import download
from edgeke.errors import InputError
from edgeke.graph.segments import export_segments
from edgeke.learning.checkpoints import Preprocessing, load_checkpoint
from edgeke.learning.images import predict
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import Source
from edgeke.policy.votes import fit_votes

SETTINGS = Settings("cifar100", 0, 4, 300, 12, None, False)
STRIPS = ROOT.parent / "shared" / "data" / "cifar100"
MINUTES = 0.7
HEADLINE = ("teacher", "main", "branchynet", "plain_resnet18")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Strips of four classes in the format of the real ones: noise, and a bright quarter."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for part, count in (("train", 160), ("test", 80)):
        (folder / "cifar100" / part).mkdir(parents=True)
        for label, name in enumerate(("ant", "bee", "cat", "dog")):
            strip = random.integers(0, 180, (count, 32, 32, 3)).astype(np.uint8)
            row, column = 16 * (label // 2), 16 * (label % 2)
            strip[:, row : row + 16, column : column + 16] += 70
            file = folder / "cifar100" / part / f"{name}.webp"
            Image.fromarray(strip.reshape(-1, 32, 3)).save(file, lossless=True)
    return folder


@pytest.fixture(scope="module")
def params_file(tmp_path_factory) -> Path:
    """params.yaml with splits that 640 images allow, and little to measure."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["profiles"]["cifar100"]["data"] |= {"validation": 120, "calibration": 200}
    content["evaluate"] |= {"latency_images": 5, "tiers": content["evaluate"]["tiers"][:1]}
    content["export"]["int8_tolerance"] = 1.0  # a few seconds of training promise nothing
    file = tmp_path_factory.mktemp("params") / "params.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def command(data: Path, params_file: Path, tmp_path_factory) -> list[str]:
    """A rehearsal; its results lie behind `--out`, the last argument."""
    return [
        sys.executable, str(ROOT / "scripts" / "cifar100"), "--data", str(data),
        "--params", str(params_file), "--width", "4", "--limit", "300", "--epochs", "12",
        "--minutes", str(MINUTES), "--out", str(tmp_path_factory.mktemp("campaign") / "out"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def out(command: list[str]) -> Path:
    """A campaign that was told to stop, then killed, then left to its end."""
    folder = Path(command[-1])
    first = _start(command)
    _wait(first, folder, lambda of: of["running"] and of["running"]["epoch"] >= 1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 130
    assert list((folder / ".edgeke").rglob("train_teacher-*.safetensors"))
    stopped = json.loads((folder / "results.json").read_text())

    second = _start(command)
    _wait(second, folder, lambda of: "main" in of["planned"] and of["running"])
    second.kill()
    assert second.wait(60) == -signal.SIGKILL
    killed = json.loads((folder / "results.json").read_text())
    assert killed["planned"]["teacher"] == stopped["planned"]["teacher"]
    assert killed["measured"] == stopped["measured"]

    third = _start(command)
    assert third.wait(300) == 0, folder.with_name("log").read_text()[-3000:]
    finished = json.loads((folder / "results.json").read_text())
    assert finished["steps"]["teacher"] == killed["steps"]["teacher"]
    return folder


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    log = Path(command[-1]).with_name("log")
    with log.open("ab") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def _wait(process: subprocess.Popen[bytes], folder: Path, condition) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = folder / "results.json"
        if file.exists() and condition(json.loads(file.read_text())):
            return
        assert process.poll() is None, folder.with_name("log").read_text()[-3000:]
        time.sleep(0.02)
    raise AssertionError("the campaign did not get there in two minutes")


def test_a_stopped_and_killed_campaign_ends_within_its_budget(out: Path):
    results = json.loads((out / "results.json").read_text())
    assert set(HEADLINE) <= set(results["steps"])
    assert results["running"] is None
    assert results["seconds_used"] < 60 * MINUTES + 30
    names = {step.name for step in make_steps(_parsed(), 12)}
    assert set(results["steps"]) | set(results["left_out"]) == names
    assert not list((out / ".edgeke").rglob("*.safetensors"))
    teacher = results["steps"]["teacher"]
    assert teacher["epochs_asked"] == 12
    assert 1 <= teacher["epochs_run"] <= 12
    assert teacher["plan"]["recipe"]["epochs"] == teacher["epochs_run"]
    assert teacher["images_per_second"] > 0
    assert results["device"].startswith("cpu")


def test_the_rival_trains_as_long_as_the_network_it_is_compared_with(out: Path):
    steps = json.loads((out / "results.json").read_text())["steps"]
    own = steps["main"]["epochs_run"] + steps["branchynet"]["epochs_run"]
    assert steps["plain_resnet18"]["epochs_run"] == own
    assert steps["plain_resnet18"]["epochs_asked"] == 24


def test_accuracies_follow_from_the_logits_that_were_written(out: Path):
    results = json.loads((out / "results.json").read_text())
    dataset = load_dataset(out / "dataset.safetensors", ("validation", "test"))
    for name in HEADLINE:
        step = results["steps"][name]
        assert all((out / "logits" / file).stat().st_size <= LIMIT for file in step["logits"])
        tensors = read_pieces(out / "logits", step["logits"])
        exits = range(len(step["test"]["exits"]))
        assert len(step["macs"]) == len(exits) == (4 if name == "branchynet" else 1)
        for split in ("validation", "test"):
            assert tensors[f"{split}.labels"].tolist() == dataset[split].labels.tolist()
            for exit in exits:
                answers = tensors[f"{split}.{exit}.logits"].float().argmax(-1).numpy()
                right = float((answers == dataset[split].labels).mean())
                assert right == pytest.approx(step[split]["exits"][exit], abs=0.02)
        logits = [tensors[f"validation.{e}.logits"].float().softmax(-1).numpy() for e in exits]
        votes = fit_votes(np.stack(logits), dataset["validation"].labels)
        assert step["votes"] == pytest.approx(votes, abs=0.02)


def test_weights_put_back_answer_like_the_originals(out: Path):
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in HEADLINE:
        pieces = sorted((out / "weights").glob(f"{name}.*.safetensors"))
        assert pieces
        assert all(piece.stat().st_size <= LIMIT for piece in pieces)
        cpu = torch.device("cpu")
        original, preprocessing = load_checkpoint(out / "checkpoints" / name, cpu)
        restored, of_restored, _ = read_network(out / "weights" / name)
        assert of_restored == preprocessing
        assert restored.architecture == original.architecture
        with torch.no_grad():
            expected, found = original(images).softmax(-1), restored(images).softmax(-1)
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)


def test_other_settings_do_not_go_on_in_the_same_folder(out: Path):
    with pytest.raises(InputError, match="was begun with width = 4, now 8"):
        Record(out, Settings("cifar100", 0, 8, 300, 12, None, False), {})


def test_large_tensors_are_split_into_pieces_and_read_back(tmp_path: Path):
    tensors = {f"{n}.weight": torch.full((2000, 1000), float(n)) for n in range(9)}
    tensors["norm.running_var"] = torch.tensor([1e5, 1e-9])  # beyond half precision
    names = write_pieces(tensors, tmp_path / "big")
    assert names == [f"big.{number}.safetensors" for number in range(3)]
    assert all((tmp_path / name).stat().st_size <= LIMIT for name in names)
    found = read_pieces(tmp_path, names)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=1e-6, atol=0)


def test_weights_beyond_half_precision_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="does not fit half precision"):
        write_pieces({"weight": torch.full((2, 2), 1e6)}, tmp_path / "net")


def _parsed():
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    return campaign_content(content, SETTINGS)[1]


def test_the_parameters_are_those_of_the_headline():
    params = _parsed()
    assert (params.profile_name, params.branchynet.layout) == ("cifar100", "stages")
    assert (params.branchynet.order, params.kd.source) == ("mixed", "both")
    assert params.profile.teacher.width == params.profile.student.width == 4
    digits = Settings("digits", 0, None, None, None, None, False)
    with pytest.raises(InputError, match="reads digits"):
        campaign_content(yaml.safe_load((ROOT / "params.yaml").read_text()), digits)


def _costs(seconds: float) -> Costs:
    kinds = ("teacher", "branch", "branchynet", "class_aware")
    return Costs(dict.fromkeys(kinds, seconds), dict.fromkeys(kinds, 0.0))


def test_schedules_shrink_until_the_headline_fits_and_rivals_stay_equal():
    steps = make_steps(_parsed(), None)
    headline = [step for step in steps if step.group == "headline"]
    full = schedule(headline, {}, _costs(1.0), 1e6)
    assert full == {"teacher": 200, "main": 200, "branchynet": 60, "plain_resnet18": 260}
    half = schedule(headline, {}, _costs(1.0), 360)
    assert half["plain_resnet18"] == half["main"] + half["branchynet"]
    assert 0.45 * 200 < half["teacher"] <= 100
    assert sum(half.values()) <= 360
    assert set(schedule(headline, {}, _costs(1.0), 0).values()) == {1, 2}


def test_rows_of_the_table_get_the_same_epochs_or_are_left_out():
    steps = make_steps(_parsed(), None)
    distances = [step for step in steps if step.group == "distances"]
    assert set(schedule(distances, {}, _costs(1.0), 1000).values()) == {30}
    (shorter,) = set(schedule(distances, {}, _costs(1.0), 90).values())
    assert 20 <= shorter < 30
    assert schedule(distances, {}, _costs(1.0), 30) == {}
    orders = [step for step in steps if step.group == "orders"]
    planned = schedule(orders, {"distance.kl": 30}, _costs(1.0), 1000)
    assert planned["order.mixed"] == planned["order.mixed.start"] == 15
    assert planned["order.asynchronous"] == planned["order.asynchronous.start"] == 10
    phases = {step.name: step.phases for step in orders}
    assert sum(phases[name] * epochs for name, epochs in planned.items()) == 90
    assert schedule(orders, {}, _costs(1.0), 1000) == {}
    few = schedule(orders, {"distance.kl": 30}, _costs(1.0), 35)
    assert list(few) == ["order.asynchronous.start", "order.asynchronous"]


def test_every_step_needs_only_steps_before_it():
    seen = set()
    for step in make_steps(_parsed(), None):
        assert set(step.needs) | set(step.starts) | set(step.budget_of) <= seen
        assert asked_epochs(step, dict.fromkeys(seen, 4)) >= 1
        seen.add(step.name)


def test_the_dataset_file_is_the_one_that_download_writes(data: Path, tmp_path: Path):
    source = Source("cifar100", 32, 3, "exact", 120, 200, None)
    found = read_strips(data / "cifar100")
    splits = cut_splits(found, source, 0)
    ready = json.loads(json.dumps({name: of.tolist() for name, of in splits.items()}))
    common = {"name": "cifar100", "source": "cifar100", "seed": 0}
    build_dataset(found, ready, tmp_path / "ours", limit=None, **common)
    expected, _ = download(found, source, "cifar100", 0)
    save_dataset(expected, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    few = build_dataset(found, ready, tmp_path / "few", limit=50, **common)
    assert {len(split.labels) for split in few.splits.values()} == {50}
    assert (few.mean, few.classes) == (expected.mean, ("ant", "bee", "cat", "dog"))


def test_strips_that_are_missing_or_misshapen_are_named(data: Path, tmp_path: Path):
    with pytest.raises(InputError, match="must hold train/<class>.webp"):
        read_strips(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (31, 64)).save(tmp_path / part / "ant.webp")
    with pytest.raises(InputError, match=r"ant.webp is 31 x 64 pixels; a strip is 32 wide"):
        read_strips(tmp_path)


@pytest.mark.skipif(not STRIPS.is_dir(), reason="the real strips are not beside this repository")
def test_the_real_strips_are_all_of_cifar100():
    found = read_strips(STRIPS)
    assert found.images.shape == (60_000, 3, 32, 32)
    assert (found.train, len(found.classes)) == (50_000, 100)
    assert set(np.bincount(found.labels[:50_000])) == {500}
    splits = cut_splits(found, _parsed().profile.data, 0)
    assert {k: len(v) for k, v in splits.items()} == {
        "train": 45_000, "validation": 1_000, "calibration": 4_000, "test": 10_000
    }  # fmt: skip


def test_a_bare_machine_needs_neither_yaml_nor_scikit_learn(
    data: Path, params_file: Path, tmp_path: Path
):
    halves = prepare(params_file, data, SETTINGS, tmp_path / "prepared")
    assert len(halves) == 2
    there = tmp_path / "there"
    for half in halves:
        subprocess.run(["cp", "-r", f"{half}/.", str(there)], check=True)
    assert (there / "cifar100" / PREPARED).is_file()
    code = f"""
import sys
for name in ("yaml", "sklearn", "mlflow", "dvc", "onnx", "onnxruntime", "accelerate", "scipy"):
    sys.modules[name] = None
sys.path.insert(0, {str(ROOT)!r})
from edgeke.campaign.cli import main
sys.exit(main(sys.argv[1:]))
"""
    command = ["--data", str(there), "--out", str(tmp_path / "out"), "--width", "4"]
    command += ["--limit", "150", "--epochs", "1", "--minutes", "0.01"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["steps"]) == set(HEADLINE)
    assert all("left" in reason for reason in results["left_out"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes 0 is too small"),
        (["--profile", "cifar1000"], "--profile cifar1000 does not exist"),
        (["--data", "/nowhere"], "must hold train/<class>.webp"),
    ],
)
def test_bad_arguments_are_answered_in_one_line(tmp_path: Path, capsys, arguments, message):
    from edgeke.campaign.cli import main

    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_paper_s_layout_is_run_as_published(architecture, dataset, tmp_path: Path):
    """One image at a time in eager mode: the answers are those of its logits and thresholds."""
    network = randomise(BranchyNet(architecture))
    preprocessing = Preprocessing.of(dataset)
    write_network(network, tmp_path / STEP, preprocessing=preprocessing, described={})
    carried, _, _ = read_network(tmp_path / STEP)  # half precision on the way
    segments = export_segments(network, dataset.mean, dataset.std, SIZE)
    bundle = build(tmp_path, segments, "max_probability", "", dataset)
    model, policy = bundle / "edgeke.onnx", Classifier(bundle).policy
    found = compare_with_published(tmp_path / STEP, dataset["test"], model, policy.named["default"])

    images = torch.from_numpy(dataset["test"].images)
    normalise = Normalise(dataset.mean, dataset.std, torch.device("cpu"))
    probabilities = predict(carried, images, normalise).softmax(-1).numpy()
    sure = probabilities.max(-1) > np.array(THRESHOLDS)[:, None]
    sure[-1] = True
    exits = sure.argmax(0)
    labels = probabilities.argmax(-1)[exits, np.arange(len(exits))]
    assert found["accuracy"] == (labels == dataset["test"].labels).mean()
    assert found["exit_shares"] == [float((exits == e).mean()) for e in range(3)]
    assert found["speedup"] == found["latency_ms_mean"] / found["own_latency_ms_mean"] > 0


def test_numbers_of_a_smaller_profile_stand_under_their_own_name(tmp_path: Path):
    headline = tmp_path / "results" / "cifar100" / "summary.json"
    small = write_summary({"profile": "cifar100_small", "teacher": 0.5}, tmp_path)
    assert small.name == "cifar100_small.json"
    content = json.loads(headline.read_text())
    assert content.pop("measured_instead") == small.name
    assert set(content) == set(SUMMARY)
    assert set(content.values()) == {None}
    assert write_summary({"profile": "cifar100", "teacher": 0.8}, tmp_path) == headline
    write_summary({"profile": "cifar100_small", "teacher": 0.6}, tmp_path)
    assert json.loads(headline.read_text())["teacher"] == 0.8


@pytest.mark.pipeline
def test_results_come_home_through_the_pipeline(
    out: Path, data: Path, params_file: Path, tmp_path: Path
):
    lock = (ROOT / "dvc.lock").read_bytes()
    script = [sys.executable, str(ROOT / "scripts" / "cifar100"), "--import", str(out)]
    script += ["--data", str(data), "--params", str(params_file), "--into", str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    stages = [line.split("'")[1] for line in done.stdout.splitlines() if "Running stage '" in line]
    assert stages == ["export", "calibrate", "evaluate"]
    assert (ROOT / "dvc.lock").read_bytes() == lock
    summary = json.loads((tmp_path / "results" / "cifar100" / "summary.json").read_text())
    steps = json.loads((out / "results.json").read_text())["steps"]
    assert set(SUMMARY) <= set(summary)
    assert summary["exits"] == steps["branchynet"]["test"]["exits"]
    assert summary["plain_resnet18"] == steps["plain_resnet18"]["test"]["exits"][0]
    assert len(summary["exit_macs_share"]) == len(summary["exits_int8"]) == 4
    assert summary["exit_macs_share"] == sorted(summary["exit_macs_share"])
    for key in ("speedup_over_fastest_static_int8", "speedup_over_fastest_static_fp32"):
        assert summary[key] is None or summary[key] > 0
    assert (summary["width"], summary["limit"]) == (4, 300)
    assert not (tmp_path / "models").exists()  # a rehearsal's weights are nobody's pretrained ones
    assert summary["teacher"] is not None
    assert (summary["published_layout"] is None) == (STEP not in steps)
    for promise in summary["promises"].values():
        assert set(promise) >= {"promised", "kept"}
    assert set(summary["within_one_point"]) >= {"speedup_over_fastest_static_int8"}
    assert "| exit 3 |" in model_card(summary)
