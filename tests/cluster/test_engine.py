"""The cluster on Ray, with processes that are really killed. One machine plays three devices."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from toys import ROOT

from edgeke.cluster.actors import start_actors
from edgeke.cluster.engine import Engine
from edgeke.cluster.plan import Profile
from edgeke.cluster.profile import measure_cluster
from edgeke.device.scores import SCORES, calibrated_probabilities
from edgeke.errors import InputError
from tests.cluster.conftest import make
from tests.cluster.profiles import device, even, profile

pytest.importorskip("ray", reason="needs requirements-ray.txt")

SLOWER = 20.0  # so that sharing pays, and there is time to kill
NAMES = ("local0", "local1", "local2")


@pytest.fixture(scope="module")
def ray() -> Iterator[object]:
    from edgeke.cluster.actors import connect, load_ray

    assert connect(None, len(NAMES)) == list(NAMES)
    module = load_ray()
    yield module
    module.shutdown()


@pytest.fixture(scope="module")
def toy():
    return make("resnet18", 64, (0.3, 0.6), width=16)


@pytest.fixture(scope="module")
def slow_devices(toy) -> Profile:
    network, _ = toy
    one = device(network, "one", SLOWER)
    rows = [type(one)(**{**vars(one), "name": name}) for name in NAMES]
    return profile(rows, 1e-4, 1e9)


@pytest.fixture(scope="module")
def running(ray, toy, slow_devices) -> Iterator[Engine]:
    with Engine(toy[0], slow_devices) as engine:
        yield engine


@pytest.fixture
def engine(ray, running) -> Engine:
    wait_for(lambda: len(running.devices) == len(NAMES))
    stretch(ray, running, SLOWER)
    return running


def stretch(ray, engine: Engine, factor: float, names=NAMES) -> None:
    for name in names:
        with contextlib.suppress(ray.exceptions.RayError, KeyError):
            ray.get(engine.actors[name].emulate.remote(factor))


def kill(ray, engine: Engine, name: str) -> None:
    pid = ray.get(engine.actors[name].describe.remote())["pid"]
    os.kill(pid, signal.SIGKILL)


def images(network, count: int, seed: int = 0) -> np.ndarray:
    shape = (count, *network.shapes["image"][1:])
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def test_answers_are_the_whole_networks(engine, toy):
    network, whole = toy
    assert len(engine.plan.devices) > 1, "sharing pays here"
    for image in images(network, 3):
        assert np.abs(engine.logits(image) - whole(image[None])).max() < 1e-4


def test_a_worker_killed_in_the_middle_of_an_image(ray, engine, toy):
    network, whole = toy
    (image,) = images(network, 1)
    engine.logits(image)
    victim = engine.plan.devices[-1]
    pid = ray.get(engine.actors[victim].describe.remote())["pid"]
    threading.Timer(0.3 * engine.plan.seconds[-1], os.kill, (pid, signal.SIGKILL)).start()
    for each in images(network, 4, 1):
        assert np.abs(engine.logits(each) - whole(each[None])).max() < 1e-4
    wait_for(lambda: victim in engine.devices)
    wait_for(lambda: victim in engine.plan.devices or len(engine.devices) == len(NAMES))
    assert np.abs(engine.logits(image) - whole(image[None])).max() < 1e-4


def test_a_worker_that_becomes_slower_gets_less(ray, engine, toy):
    network, whole = toy
    before = dict(zip(engine.plan.devices, engine.plan.layout.heights, strict=True))
    victim = engine.plan.devices[0]
    stretch(ray, engine, 6 * SLOWER, (victim,))

    def less() -> bool:
        (image,) = images(network, 1)
        assert np.abs(engine.logits(image) - whole(image[None])).max() < 1e-4
        shares = dict(zip(engine.plan.devices, engine.plan.layout.heights, strict=True))
        whole_before, whole_now = sum(before.values()), sum(shares.values())
        return shares.get(victim, 0) / whole_now < 0.6 * before[victim] / whole_before

    wait_for(less)


def test_two_clients_at_once_get_their_own_answers(engine, toy):
    network, whole = toy
    every, wrong = images(network, 12), []

    def ask(part: np.ndarray) -> None:
        wrong.extend(
            image
            for image in part
            if np.abs(engine.logits(image) - whole(image[None])).max() > 1e-4
        )

    threads = [threading.Thread(target=ask, args=(every[k::2],)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_sure_exit_stops_the_round(engine, toy):
    network, whole = toy
    (image,) = images(network, 1)
    (token,) = engine.begin(image[None])
    first = engine.exit_logits(int(token), 0)
    assert np.abs(first - whole(image[None])[0]).max() < 1e-4
    begun = engine._kept[int(token)]
    assert begun.phases < engine._active.programs.ends[-1], "later phases were not even asked for"
    assert 0 < float(SCORES["margin"](calibrated_probabilities(first[None, None], [1.0]))[0, 0]) < 1
    engine.forget(int(token))


def test_devices_that_are_not_there(ray, toy):
    network, _ = toy
    with pytest.raises(InputError, match="none of oven is in the cluster; join them: ray start"):
        Engine(network, profile([even(network, "oven", 1.0)], 1e-4, 1e9))


@pytest.mark.slow
def test_500_images_under_random_faults(ray, engine, toy):
    network, whole = toy
    random, worst, faults = np.random.default_rng(7), 0.0, 0
    for number, image in enumerate(images(network, 500, 7)):
        present = [name for name in NAMES if name in engine.devices]
        if number % 20 == 10 and len(present) > 1:
            victim = str(random.choice(present))
            if random.random() < 0.6:
                with contextlib.suppress(ray.exceptions.RayError, KeyError):
                    kill(ray, engine, victim)
            else:
                stretch(ray, engine, float(random.choice([1.0, 20.0, 100.0])), (victim,))
            faults += 1
        worst = max(worst, float(np.abs(engine.logits(image) - whole(image[None])).max()))
    assert faults >= 20
    assert worst < 1e-4


@pytest.mark.slow
def test_a_device_that_leaves_while_it_is_measured_is_named(ray, running, toy):
    running.close()
    actors = start_actors(NAMES, 1)
    os.kill(ray.get(actors["local1"].describe.remote())["pid"], signal.SIGKILL)
    with pytest.raises(InputError, match="local1 left while it was measured"):
        measure_cluster(toy[0], actors, "", "fp32", 1)
    for actor in actors.values():
        ray.kill(actor)


@pytest.mark.slow
def test_a_leader_that_is_killed_and_started_again(ray, running, toy, slow_devices, tmp_path):
    running.close()  # the devices are free for another leader
    network, whole = toy
    address = ray.get_runtime_context().gcs_address
    script = (
        "import pickle, sys, time\n"
        "from edgeke.cluster.actors import connect\n"
        "from edgeke.cluster.engine import Engine\n"
        "connect(sys.argv[1], None)\n"
        "network, profile = pickle.load(open(sys.argv[2], 'rb'))\n"
        "engine = Engine(network, profile)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    import pickle

    file = tmp_path / "arguments"
    file.write_bytes(pickle.dumps((network, slow_devices)))
    command = [sys.executable, "-c", script, address, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        assert leader.stdout.readline() == "ready\n"
        leader.kill()
    with Engine(network, slow_devices) as engine:
        for image in images(network, 3):
            assert np.abs(engine.logits(image) - whole(image[None])).max() < 1e-4
