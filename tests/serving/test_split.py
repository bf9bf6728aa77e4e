"""A device and a server, real processes, and a link between them that fails."""

import os
import pickle
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from toys import ROOT

from benchmarks.link import Link
from edgeke.device.choice import Request, UnmetError
from edgeke.device.classifier import Classifier
from edgeke.device.codec import decode, encode, parse_codec
from edgeke.device.partitions import Partition, as_logits
from edgeke.device.policy import force_exit
from edgeke.device.scores import calibrated_probabilities
from edgeke.errors import InputError


class Heart(threading.Thread):
    """Beats every 2 ms, to know for how long a busy machine did not run this process."""

    def __init__(self):
        super().__init__(daemon=True)
        self.late, self.going = 0.0, True
        self.start()

    def run(self):
        last = time.monotonic()
        while self.going:
            time.sleep(0.002)
            now = time.monotonic()
            self.late += max(0.0, now - last - 0.004)
            last = now

    def within(self, milliseconds, limit, before):
        """Whether it took no longer, the time apart in which this process did not run."""
        time.sleep(0.004)
        return milliseconds < limit + 3e3 * (self.late - before)


@pytest.fixture
def heart():
    beating = Heart()
    yield beating
    beating.going = False
    beating.join()


class World:
    """A device whose way to the server leads through a link."""

    def __init__(self, folder, server, link, **options):
        self.server, self.link = server, link
        self.device = Classifier(folder, server=f"http://127.0.0.1:{link.port}", **options)
        self.local = Classifier(folder)
        self.rest = self.device._rest

    def use(self, name, thresholds=None):
        """Have every request take one partition, at thresholds under which all images are sent."""
        partition: Partition = next(each for each in self.device.partitions if each.name == name)
        way = next(each for each in self.rest._ways if each.partition is partition)
        exits = partition.after + 2
        point = partition.policy.point("full")
        assert point.thresholds == force_exit(exits - 1, exits)
        self.rest._plan = lambda request, measured: (way, point)
        return partition, point

    def expected(self, name, image, place):
        """The last exit's probabilities at the partition's temperature, through its codec too."""
        partition = next(each for each in self.device.partitions if each.name == name)
        segments, features = self.local.open_segments(), image[None]
        for exit in range(3):
            if exit == partition.after + 1 > 0 and place == "server":
                codec = parse_codec(partition.codec)
                features = decode(encode(features, codec), features.shape[1:], 1)
            probabilities, features = segments.probabilities(exit, features)
        temperature = partition.policy.temperatures[-1:]
        return calibrated_probabilities(as_logits(probabilities)[None], temperature)[0, 0]

    def check(self, name, image, answer):
        """Whether it is this image's answer, of the place that it says."""
        if not answer.promise_void:
            expected = self.expected(name, image, answer.place)
            assert np.allclose(answer.probabilities, expected, atol=1e-4), (name, answer)
            assert answer.exit == 2


@pytest.fixture
def folder(divided, tmp_path) -> Path:
    return Path(shutil.copytree(divided, tmp_path / "divided"))


@pytest.fixture
def world(folder, tail_server):
    with Link("127.0.0.1", tail_server.port) as link:
        yield World(folder, tail_server, link, patience_ms=20_000)


def test_a_partition_gives_what_its_codec_lets_through(world, images):
    world.rest.link.keep_measured = lambda: None
    for name in ("after_0_q4", "after_0_f32", "after_1_q8", "raw"):
        partition, point = world.use(name)
        before = world.link.sent
        for image in images[:10]:
            answer = world.device.predict(image)
            world.check(name, image, answer)
            assert (answer.place, answer.promise_void) == ("server", False)
            assert answer.point == point
        sent = world.link.sent - before
        assert answer.sent_bytes == pytest.approx(sent / 10, abs=60), "raw pictures differ in size"
    partition, point = world.use("after_0_q4")
    everything = point.__class__(**{**vars(point), "thresholds": (-1.0, 2.0)})
    way = world.rest._plan(None, None)[0]
    world.rest._plan = lambda request, measured: (way, everything)
    before = world.link.sent
    answer = world.device.predict(images[0])
    assert (answer.place, answer.exit, answer.sent_bytes) == ("device", 0, 0)
    assert world.link.sent == before, "what the device is sure of does not leave it"


def test_the_choice_follows_the_link(world, images):
    """Whatever is asked, the least expected cost among what keeps it."""
    rest, link = world.rest, world.rest.link
    measured = world.device.measured
    slow = type(measured)(
        *(tuple(1e3 * ms for ms in each) for each in (measured.median_ms, measured.p95_ms)),
        measured.rounds,
    )
    world.device._measured = slow  # a device a thousand times slower than it is
    link.probe = link.keep_measured = lambda: None
    link.round_trip, link.per_byte, link.deviation = 1e-3, 1e-9, 1e-4
    link.server_ms = dict.fromkeys(("raw", "0", "1"), 1.0)
    link.version += 1
    fast = world.device.predict(images[0], max_degradation=0.9)
    best, _ = rest._plan(Request(max_degradation=0.9), slow)
    assert best is not None
    assert best.partition.codec == "raw", "a slow device on a fast link sends the picture"
    assert fast.place == "server"
    link.per_byte = 1.0
    link.version += 1
    assert rest._plan(Request(max_degradation=0.9), slow)[0] is None
    answer = world.device.predict(images[0], max_degradation=0.9)
    assert (answer.place, answer.sent_bytes) == ("device", 0)
    with pytest.raises(UnmetError, match="cannot be promised"):
        world.device.predict(images[0], max_degradation=1e-6)


def test_the_link_is_measured_from_its_own_traffic(world, images):
    link = world.rest.link
    world.use("after_0_f32")
    world.link.set(rate_mbit=100.0)
    link.probe()
    world.link.set(rate_mbit=0.5, delay_ms=20.0)
    answers = [world.device.predict(image) for image in images[:15]]
    size = answers[0].sent_bytes
    took = float(np.median([answer.latency_ms for answer in answers[-7:]])) / 1e3
    least = 0.04 + 8 * size / 0.5e6
    assert took >= least
    assert max(0.7 * least, 0.4 * took) < link.seconds(size) < 3 * took


def test_a_link_that_has_become_slow_is_measured_with_fewer_bytes(world, monkeypatch):
    link = world.rest.link
    monkeypatch.setattr("edgeke.device.link._PROBE_SECONDS", 0.6)
    world.link.set(rate_mbit=0.1)
    with pytest.warns(UserWarning, match="timed out"):
        link.probe()
    assert not link.usable
    recovers(link)
    assert link.per_byte > 2e-5


@pytest.mark.parametrize("fault", ["garbage", "half", "swap", "reset", "silence", "refuse"])
def test_an_answer_that_cannot_be_used_is_replaced_by_the_device_s(world, images, heart, fault):
    world.use("after_0_q4")
    assert world.device.predict(images[0]).place == "server"
    world.link.set(faults={fault: 1.0})
    world.rest.link.close()
    probes, world.rest.link.keep_measured = world.rest.link.keep_measured, lambda: None
    world.rest._patience = 0.15
    for image in images[:4]:
        before = heart.late
        answer = world.device.predict(image)
        assert heart.within(answer.latency_ms, 300, before)
        assert (answer.place, answer.promise_void) == ("device", False)
        world.check("after_0_q4", image, answer)
    assert not world.rest.link.usable, "the server is left alone now"
    world.link.set()
    world.rest.link.keep_measured = probes
    recovers(world.rest.link)


def recovers(link):
    deadline = time.monotonic() + 10
    while not link.usable:
        link.keep_measured()
        time.sleep(0.02)
        assert time.monotonic() < deadline, "the server was not tried again"


def test_deadlines_are_kept_while_the_server_is_silent(world, images, heart):
    world.use("after_0_q4")
    world.link.set(faults={"silence": 1.0})
    for image in images[:5]:
        before = heart.late
        answer = world.device.predict(image, deadline_ms=400)
        assert answer.place == "device"
        assert heart.within(answer.latency_ms, 400, before)
        world.check("after_0_q4", image, answer)
    late = world.rest._until(Request(deadline=400.0), world.device.measured, 0, 2, 0.0)
    rest = world.device.measured.p95_ms[2] - world.device.measured.p95_ms[0]
    assert late == pytest.approx(0.38 - 1.1e-3 * rest)


def test_without_time_for_the_rest_the_promise_of_an_early_answer_is_void(world, images, heart):
    world.use("after_0_q4")
    world.link.set(faults={"silence": 1.0})
    measured = world.device.measured
    times = (measured.p95_ms[0], 5_000.0, 9_000.0)  # deeper exits would take seconds
    world.device._measured = type(measured)(times, times, 1)
    before = heart.late
    answer = world.device.predict(images[0], deadline_ms=400)
    assert (answer.exit, answer.place, answer.promise_void) == (0, "device", True)
    assert heart.within(answer.latency_ms, 400, before)


def test_a_server_that_dies_and_comes_back(folder, serve, images):
    server = serve(folder=folder)
    with Link("127.0.0.1", server.port) as link:
        world = World(folder, server, link, patience_ms=20_000)
        world.use("after_0_q4")
        assert world.device.predict(images[0]).place == "server"
        os.kill(server.process.pid, signal.SIGSTOP)  # in the middle of a request
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(world.device.predict, images[1])
            time.sleep(0.05)
            server.process.kill()
            answer = waiting.result()
        assert answer.place == "device"
        world.check("after_0_q4", images[1], answer)
        for image in images[:3]:
            assert world.device.predict(image).place == "device"
        again = subprocess.Popen(server.process.args, cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while not world.rest.link.usable:
                world.rest.link.keep_measured()
                time.sleep(0.05)
                assert time.monotonic() < deadline
            assert world.device.predict(images[2]).place == "server"
        finally:
            again.kill()
            again.wait()


def test_a_server_of_another_model_is_not_asked(divided, server, images):
    with pytest.warns(UserWarning, match="stay on this device.*refused"):
        other = Classifier(divided, server="http://127.0.0.1:1", patience_ms=100)
    other._rest.link._port = server.port  # its segments are the same, but it has another file
    other._rest.link.segments = "0" * 64
    with pytest.warns(UserWarning, match="serves another model"):
        other._rest.link.probe()
    assert not other._rest.link.usable
    assert other.predict(images[0]).place == "device"


def test_what_cannot_work_is_refused(divided, toy):
    with pytest.raises(InputError, match="no partitions"):
        Classifier(toy, server="http://127.0.0.1:9")
    for address in ("127.0.0.1:8000", "ftp://host", "http://", "http://h:99999"):
        with pytest.raises(InputError, match="must be an address"):
            Classifier(divided, server=address)
    with pytest.raises(InputError, match="patience_ms"):
        Classifier(divided, server="http://127.0.0.1:9", patience_ms=0)
    with pytest.raises(InputError, match="needs the segments"):
        Classifier(divided / "edgeke.onnx", server="http://127.0.0.1:9")


def test_a_token_and_worker_processes(folder, serve, images, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret\n")
    server = serve("--token-file", str(token), folder=folder)
    with pytest.warns(UserWarning, match="status 401"):
        refused = Classifier(folder, server=server.url)
    assert not refused._rest.link.usable
    allowed = Classifier(folder, server=server.url, token="secret")
    assert allowed._rest.link.usable
    copy = pickle.loads(pickle.dumps(allowed))
    assert copy._rest.link.usable
    batch = allowed.predict_batch(images[:3])
    assert [each.label for each in batch] == [allowed.predict(i).label for i in images[:3]]


FAULTS = {
    "stall": 0.02, "garbage": 0.03, "half": 0.03, "swap": 0.03, "reset": 0.03, "silence": 0.005,
}  # fmt: skip


def storm(world, images, heart, requests):
    """Requests under random faults: every one is answered, in time, and as its own image's."""
    names = ("after_0_q4", "after_0_f32", "after_1_q8", "raw")
    plans = []
    for name in names:
        world.use(name)
        plans.append(world.rest._plan(None, None))
    world.rest._patience = 0.1
    world.link.set(faults={**FAULTS, "refuse": 0.05})
    places, dice = [], np.random.default_rng(0)
    for number in range(requests):
        which, image = dice.integers(len(names)), images[dice.integers(len(images))]
        world.rest._plan = lambda request, measured, plan=plans[which]: plan
        deadline = 80.0 if number % 4 == 0 else None
        before = heart.late
        answer = world.device.predict(image, deadline_ms=deadline)
        world.check(names[which], image, answer)
        # Half as long again: what a busy machine adds. Without the way back it would be seconds.
        assert heart.within(answer.latency_ms, 1.5 * (deadline or 250), before), answer
        places.append(answer.place)
        world.rest.link.keep_measured()
    assert set(places) == {"server", "device"}


def test_no_answer_is_mixed_up_under_random_faults(world, images, heart):
    storm(world, images, heart, 150)


@pytest.mark.slow
def test_no_answer_is_mixed_up_under_2_000_random_faults(world, images, heart):
    storm(world, images, heart, 2000)
