"""Shift and kept images behind HTTP."""

import asyncio
import json
import signal
import time
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeke.device.classifier import Classifier
from edgeke.errors import InputError
from edgeke.serving.application import Server, Settings
from edgeke.serving.keep import Keeper, no_exit_was_sure, parse_size

LIMIT = 10**6


def body(images: np.ndarray) -> bytes:
    tensor = {"name": "image", "datatype": "UINT8", "shape": images.shape, "data": images.tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def infer(server, images, **requirements) -> dict:
    content = json.loads(body(images)) | {"parameters": requirements}
    address = f"{server.url}/v2/models/edgeke/infer"
    request = urllib.request.Request(address, json.dumps(content).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["parameters"]


def metrics(server) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#"}


def test_an_alarm_voids_promises_and_outlives_the_server(serve, bundle, images, tmp_path):
    state, kept = tmp_path / "shift.json", tmp_path / "kept"
    options = ("--shift-state", str(state), "--keep-unsure", str(kept), "--keep-limit", "1MB")
    server = serve(*options)
    said = infer(server, images[:5], max_degradation=0.9)
    assert said["promised"] is True
    assert "promised_max_degradation" in said
    dark = np.zeros((60, *images.shape[1:]), np.uint8)
    for _ in range(4):
        said = infer(server, dark, max_degradation=0.9)
    assert said["promised"] is False
    assert "promised_max_degradation" not in said
    server.process.send_signal(signal.SIGHUP)  # the same model again: its alarm stays
    deadline = time.monotonic() + 30
    while "reloaded" not in server.log():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert infer(server, images[:1])["promised"] is False
    values = metrics(server)
    assert values["edgeke_shift_alarm"] == 1
    assert values["edgeke_shift_images"] == 5 + 240 + 1
    assert values["edgeke_shift_evidence"] > 0
    assert server.log().count("alarm of shift") == 1
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(30)
    names = {file.name for file in kept.iterdir()}
    pixels = {name for name in names if name.endswith(".png")}
    assert len(names) == 2 * len(pixels)
    assert len(pixels) >= 2  # the dark image is one, whatever its number
    answer = json.loads((kept / f"{sorted(pixels)[0][:-4]}.json").read_text())
    assert answer["promised"] is False
    assert len(answer["probabilities"]) == 3
    assert infer(serve(*options), images[:1])["promised"] is False


def test_a_server_that_cannot_keep_what_it_should_does_not_start(bundle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        Server(Settings(bundle, keep_unsure=tmp_path / "file"))
    server = Server(Settings(bundle, shift_state=tmp_path / "file"))
    with pytest.raises(InputError, match="is no state of shift"), server.check() as classifier:
        server.watch(classifier)


def test_a_model_of_another_policy_begins_anew(bundle, images, tmp_path):
    """The file passes from the old model to the new one, which renews it."""
    state = tmp_path / "shift.json"
    old, fresh = Classifier(bundle, shift_state=state), Classifier(bundle)
    old.predict_batch(np.zeros((240, *images.shape[1:]), np.uint8))
    assert not old.promised
    assert fresh._monitor is not None
    fresh._monitor._policy = "another"
    fresh._metadata = type(fresh._metadata)(**vars(fresh._metadata) | {"policy_sha256": "another"})
    with pytest.warns(UserWarning, match="belongs to another policy"):
        fresh.take_over_shift(old)
    old.predict(images[0])
    old.close()
    assert fresh.promised
    assert json.loads(state.read_text())["policy"] == "another"


def keep(folder: Path, images, limit: int = LIMIT) -> list[str]:
    outcomes: list[str] = []
    keeper = Keeper(folder, limit, outcomes.append)
    for number, image in enumerate(images):
        keeper.offer(image, partial(dict, label=number))
        time.sleep(0.002)
    keeper.close()
    return outcomes


def test_kept_images_are_the_pixels_with_their_answer(images, tmp_path):
    assert keep(tmp_path, [images[0], images[1], images[0]]) == ["kept"] * 3
    files = {file.name: file for file in tmp_path.iterdir()}
    assert len(files) == 4  # the same content has the same name
    labels = {}
    for name, file in files.items():
        if name.endswith(".png"):
            label = json.loads(files[f"{name[:-4]}.json"].read_text())["label"]
            labels[label] = np.asarray(Image.open(file))
    assert np.array_equal(labels[1], images[1, ..., 0])
    assert np.array_equal(labels[2], images[0, ..., 0])


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_the_oldest_go_first_and_the_limit_holds_over_restarts(tmp_path):
    random = np.random.default_rng(0)
    pictures = list(random.integers(0, 256, (12, 16, 16, 3), np.uint8))
    (tmp_path / "notes.txt").write_text("a person's")
    keep(tmp_path, pictures[:6], limit=5000)
    assert size(tmp_path) <= 5000 + 10
    keep(tmp_path, pictures[6:], limit=3000)
    labels = [json.loads(f.read_text())["label"] for f in tmp_path.glob("*.json")]
    assert sorted(labels) == list(range(6 - len(labels), 6))
    assert 2000 < size(tmp_path) <= 3000 + 10
    assert (tmp_path / "notes.txt").exists()


def test_what_cannot_be_written_is_counted_and_hurts_nobody(images, tmp_path, caplog):
    folder = tmp_path / "kept"
    outcomes: list[str] = []
    keeper = Keeper(folder, LIMIT, outcomes.append)
    folder.rename(tmp_path / "gone")
    keeper.offer(images[0], partial(dict, label=0))
    while not outcomes:
        time.sleep(0.01)
    (tmp_path / "gone").rename(folder)
    keeper.offer(images[1], partial(dict, label=1))
    keeper.close()
    assert outcomes == ["failed", "kept"]
    assert "was not kept" in caplog.text
    assert keep(tmp_path / "small", images[:1], limit=10) == ["failed"]


def test_too_many_at_once_are_dropped(images, tmp_path, monkeypatch):
    monkeypatch.setattr(Keeper, "_keep", lambda *_: time.sleep(0.05))
    outcomes: list[str] = []
    keeper = Keeper(tmp_path, LIMIT, outcomes.append)
    started = time.monotonic()
    for _ in range(200):
        keeper.offer(images[0], dict)
    assert time.monotonic() - started < 0.5
    assert outcomes.count("dropped") >= 130


def test_without_pillow_images_are_arrays(images, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    assert keep(tmp_path, images[:1]) == ["kept"]
    assert np.array_equal(np.load(next(tmp_path.glob("*.npy"))), images[0])


def test_unsure_is_what_all_thresholds_declined(bundle):
    points = Classifier(bundle).policy.named
    full, proportions = points["full"], points["proportions"]
    assert not any(no_exit_was_sure(full, exit) for exit in range(4))
    unsure = [no_exit_was_sure(proportions, exit) for exit in range(4)]
    real = [0 <= threshold <= 1 for threshold in proportions.thresholds]
    assert unsure[3]
    assert not any(u for u, r in zip(unsure, real, strict=False) if r)


@pytest.mark.parametrize("text", ["500", "0MB", "-1GB", "many", "5 MiB"])
def test_a_size_says_its_unit(text):
    assert parse_size("1.5GB") == 1_500_000_000
    with pytest.raises(InputError, match="is no size"):
        parse_size(text)


def test_unsure_images_are_kept(bundle, images, tmp_path):
    """In the server's process, at a point that has thresholds."""

    async def main() -> None:
        server = Server(Settings(bundle, keep_unsure=tmp_path / "kept"))
        server.batches = await asyncio.to_thread(server._open)
        classifier, points = server.batches.classifier, server.batches.policy.points
        # Its last exit always answers, whether it is sure or not.
        point = next(p for p in points if p.thresholds[-1] < 0 and 20 < p.reached[-1] < 70)
        server.batches._choose = lambda *_: (point, {"delta": 0.1})  # type: ignore[method-assign]
        server.batches.start()
        answers = await server.batches.answer(images[:30], {}, time.perf_counter())
        server._keep(images[:30], answers, classifier)
        await server.batches.close()
        assert server.keeper is not None
        server.keeper.close()
        unsure = [no_exit_was_sure(point, exit) for exit in answers.exit.tolist()]
        assert 0 < sum(unsure) < 30
        assert len(list((tmp_path / "kept").glob("*.png"))) == sum(unsure)

    asyncio.run(main())
