"""The queue: same answers as the classifier, and a refusal instead of a late answer."""

import asyncio
import time
from collections import deque

import numpy as np
import pytest

from edgeke.device.choice import UnmetError
from edgeke.device.classifier import Classifier
from edgeke.errors import InputError
from edgeke.serving.batches import Batches, BusyError
from edgeke.serving.costs import SegmentCosts


def run(bundle, ask, **options):
    """`ask(batches)` in an event loop of its own, the queue started and closed."""

    async def main():
        batches = Batches(Classifier(bundle), **options)
        batches.start()
        try:
            return await ask(batches)
        finally:
            await batches.close()

    return asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("most", [1, 7, 32])
def test_answers_are_those_of_the_classifier(toy, images, most):
    """Requests of several sizes and requirements, all waiting at once."""
    classifier = Classifier(toy)
    deltas = [{}, {"max_degradation": 0.9}, {"min_accuracy": 0.05}, {"delta": 0.5}]
    sizes = [1, 3, 40, 2, 5, 1, 17, 8]
    images = np.concatenate([images] * (1 + sum(sizes) // len(images)))

    async def ask(batches):
        now = time.perf_counter()
        starts = np.cumsum([0, *sizes[:-1]])
        return await asyncio.gather(
            *(
                batches.answer(images[s : s + n], deltas[k % 4], now)
                for k, (s, n) in enumerate(zip(starts, sizes, strict=True))
            )
        )

    answered = run(toy, ask, most=most, longest=60.0)
    start = 0
    for number, (size, answers) in enumerate(zip(sizes, answered, strict=True)):
        expected = classifier.predict_batch(images[start : start + size], **deltas[number % 4])
        assert answers.point == expected[0].point
        assert answers.exit.tolist() == [each.exit for each in expected]
        probabilities = np.stack([each.probabilities for each in expected])
        assert np.allclose(answers.probabilities, probabilities, atol=1e-5)
        start += size
    assert len({e for a in answered for e in a.exit.tolist()}) > 1, "several exits are used"


def test_the_backlog_returns_to_nothing(toy, images):
    async def ask(batches):
        now = time.perf_counter()
        await asyncio.gather(*(batches.answer(images[:9], {}, now) for _ in range(20)))
        return batches._backlog, batches.images

    backlog, waiting = run(toy, ask, longest=60.0)
    assert abs(backlog) < 1e-9
    assert waiting == 0


def test_under_load_earlier_exits_answer_and_then_none(toy, images, monkeypatch):
    """The same deadline: met by any exit when idle, by the first one later, refused at last."""

    async def ask(batches):
        batches.costs = SegmentCosts((0.01,) * 3, (0.002,) * 3, (1.0,) * 3)
        batches._shared = np.full(3, 0.002)
        worst = [1e3 * batches.costs.between(0, k, 1) for k in range(3)]
        deadline = {"deadline_ms": 100.0}
        deepest, cost, refused = [], [], None
        monkeypatch.setattr(batches, "_feed", lambda: None)  # the queue only grows
        tasks = []
        for _ in range(2000):
            now = time.perf_counter()
            try:
                point, _ = batches._admit(1, deadline, now)
            except BusyError as error:
                refused = error
                break
            deepest.append(point.deepest)
            cost.append(point.expected_cost([1.0, 2.0, 3.0]))
            tasks.append(asyncio.ensure_future(batches.answer(images[:1], deadline, now)))
            await asyncio.sleep(0)
        with pytest.raises(UnmetError) as unmet:
            await batches.answer(images[:1], {"deadline_ms": 5.0}, time.perf_counter())
        for task in tasks:
            task.cancel()
        monkeypatch.undo()
        batches._waiting = [deque() for _ in range(3)]
        return deepest, cost, refused, unmet.value, worst

    deepest, cost, refused, unmet, worst = run(toy, ask)
    assert deepest[0] == 2
    assert deepest[-1] == 0
    assert deepest == sorted(deepest, reverse=True)
    assert cost == sorted(cost, reverse=True)
    assert cost[-1] < cost[len(cost) // 3] < cost[0], "cheaper long before nothing fits"
    assert refused is not None
    assert refused.seconds > 0
    assert unmet.nearest == pytest.approx(worst[0], rel=1e-6), "no load would help: it is named"


def test_without_a_deadline_no_more_waits_than_was_said(toy, images):
    async def ask(batches):
        async def one():
            return await batches.answer(images[:40], {}, time.perf_counter())

        return await asyncio.gather(*(one() for _ in range(400)), return_exceptions=True)

    async def ask_idle(batches):
        batches.check_load(time.perf_counter(), 10**9)

    run(toy, ask_idle)
    answered = run(toy, ask, longest=0.01)
    busy = [each for each in answered if isinstance(each, BusyError)]
    assert 0 < len(busy) < 400
    assert not [e for e in answered if isinstance(e, Exception) and not isinstance(e, BusyError)]


def test_a_batch_that_fails_fails_its_own_requests_alone(toy, images, monkeypatch):
    async def ask(batches):
        good = batches._segments.probabilities

        def broken(exit, features):
            if len(features) == 3:
                raise RuntimeError("no memory")
            return good(exit, features)

        monkeypatch.setattr(batches._segments, "probabilities", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            await batches.answer(images[:3], {}, time.perf_counter())
        after = await batches.answer(images[:1], {}, time.perf_counter())
        return after, batches._backlog

    after, backlog = run(toy, ask)
    assert len(after.exit) == 1
    assert abs(backlog) < 1e-9


def test_three_times_too_much_is_answered_in_time_or_refused_at_once(toy, images, monkeypatch):
    """Batches take 4 times as long as was measured; requests come at 3 times what that allows."""

    async def ask(batches):
        good, cost = batches._segments.probabilities, 0.004

        def slow(exit, features):
            time.sleep(4 * cost)
            return good(exit, features)

        monkeypatch.setattr(batches._segments, "probabilities", slow)
        batches.costs = SegmentCosts((cost,) * 3, (1e-6,) * 3, (1.0,) * 3)
        batches._shared, batches._largest = np.full(3, cost / 4), [4] * 3
        answered, refused = [], []

        async def one():
            came = time.perf_counter()
            try:
                await batches.answer(images[:4], {"deadline_ms": 200.0}, came)
                answered.append((came, time.perf_counter() - came))
            except BusyError:
                refused.append(time.perf_counter() - came)

        started, tasks = time.perf_counter(), []
        while time.perf_counter() < started + 2:
            tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(4 * cost / 3)
        await asyncio.gather(*tasks)
        return [took for came, took in answered if came > started + 0.5], refused, 4 * cost

    took, refused, cost = run(toy, ask)
    assert sum(each <= 0.2 for each in took) >= 0.97 * len(took)
    assert len(took) > 0.6 * 1.5 / cost / 3, "at most three segments an image"
    assert len(refused) > len(took)
    assert sorted(refused)[len(refused) // 2] < 0.005


def test_a_server_that_was_slow_is_busy_and_forgets_it(toy, images):
    async def ask(batches):
        alone = 1e3 * batches.costs.between(0, 0, 1)
        now = time.perf_counter()
        batches._slowed, batches._ended = 100.0, now
        with pytest.raises(BusyError):
            batches._admit(1, {"deadline_ms": 50 * alone}, now)
        batches._ended -= 60.0  # seconds ago
        batches._admit(1, {"deadline_ms": 50 * alone}, time.perf_counter())

    run(toy, ask)


def test_answers_that_left_late_are_expected_again_until_they_are_forgotten(toy, images):
    async def ask(batches):
        def answer():
            return batches.answer(images[:1], {"deadline_ms": 100.0}, time.perf_counter())

        await answer()
        batches._lateness.see(0.15)
        with pytest.raises(BusyError):
            await answer()
        batches._lateness._seen -= 2.0  # seconds ago
        return await answer()

    assert not run(toy, ask).late


@pytest.mark.parametrize(
    "asked", [{"deadline_ms": -1}, {"deadline_ms": True}, {"delta": 2}, {"min_accuracy": "high"}]
)
def test_requirements_without_sense_are_refused(toy, images, asked):
    async def ask(batches):
        with pytest.raises(InputError):
            await batches.answer(images[:1], asked, time.perf_counter())

    run(toy, ask)


def test_no_images_are_refused(toy, images):
    async def ask(batches):
        with pytest.raises(InputError, match="no images"):
            await batches.answer(images[:0], {}, time.perf_counter())

    run(toy, ask)


def test_a_model_that_was_replaced_refuses_instead_of_never_answering(toy, images):
    """A request whose body arrives while SIGHUP closes the old model."""

    async def ask(batches):
        await batches.close()
        with pytest.raises(BusyError, match="being replaced"):
            await asyncio.wait_for(batches.answer(images[:1], {}, time.perf_counter()), 5)

    run(toy, ask)
