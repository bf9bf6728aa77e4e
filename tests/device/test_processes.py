"""A classifier in forked and spawned processes, closed, reopened a thousand times; old versions."""

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pytest
from toys import ROOT

from edgeke.device import needs
from edgeke.device.choice import UnmetError
from edgeke.device.classifier import Classifier
from edgeke.errors import InputError

# Python 3.12 and newer warn of what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def forked(work, seconds: float = 30) -> int | None:
    """The exit status of a forked child that does the work and ends; None where it hangs."""
    child = os.fork()
    if not child:
        status = 99
        try:
            status = work() or 0
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_answers_whatever_other_threads_did(bundle, images, threads):
    """As under gunicorn --preload: locks and thread pools of the parent do not exist there."""
    classifier = Classifier(bundle, threads=threads)
    classifier.open_segments()
    expected = [classifier.predict(image).label for image in images[:5]]
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            classifier.predict_batch(images)

    busy = [threading.Thread(target=target) for target in (work, partial(classifier.profile, 500))]
    with classifier._opening:
        for thread in busy:
            thread.start()

        def child() -> int:
            one = [classifier.predict(image, deadline_ms=1e4).label for image in images[:5]]
            many = [answer.label for answer in classifier.predict_batch(images[:5])]
            return int(one != many or len(one) != 5)

        statuses = [forked(child) for _ in range(5)]
    stop.set()
    for thread in busy:
        thread.join()
    assert statuses == [0] * 5
    assert [classifier.predict(image).label for image in images[:5]] == expected


def test_a_forked_child_ends_by_itself(bundle):
    """Freeing a session waits for its threads, which a child lacks."""
    code = (
        "import os, sys; from edgeke.device.classifier import Classifier\n"
        "classifier = Classifier(sys.argv[1], threads=2); child = os.fork()\n"
        "if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "del classifier; sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, bundle], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 7


def test_a_model_that_was_replaced_is_not_opened_by_a_child(bundles, bundle, images):
    classifier = Classifier(bundle)
    shutil.copyfile(bundles["entropy"] / "edgeke.onnx", bundle / "edgeke.onnx")

    def child() -> int:
        with pytest.raises(InputError, match="was replaced after this process was forked"):
            classifier.predict(images[0])
        return 3

    assert forked(child) == 3
    assert classifier.predict(images[0])


def ask(classifier: Classifier, image: np.ndarray, **requirements: float) -> tuple[int, str, int]:
    answer = classifier.predict(image, **requirements)
    return answer.label, classifier.order, os.getpid()


def test_a_worker_process_opens_the_files_again(bundle, images, monkeypatch):
    monkeypatch.chdir(bundle.parent)
    classifier = Classifier(bundle.name, "fp32", order="bgr")
    expected = classifier.predict(images[0]).label
    monkeypatch.chdir(ROOT / "tests" / "device")
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with ProcessPoolExecutor(1, spawn) as pool:
        label, order, process = pool.submit(ask, classifier, images[0]).result(60)
        assert (label, order) == (expected, "bgr")
        assert process != os.getpid()
        with pytest.raises(UnmetError) as caught:  # errors come back whole
            pool.submit(ask, classifier, images[0], max_degradation=1e-5).result(60)
    assert 0 < caught.value.nearest < 1


def test_a_closed_classifier_says_so_and_holds_nothing(bundle, images):
    with Classifier(bundle) as classifier:
        classifier.predict_batch(images)
        sessions = [weakref.ref(classifier._session), weakref.ref(classifier.open_segments())]
    assert [session() for session in sessions] == [None, None]
    for call in (
        classifier.predict,
        classifier.stream,
        lambda image: classifier.predict_batch([image]),
    ):
        with pytest.raises(InputError, match="was closed; open another"):
            call(images[0])
    classifier.close()


def test_a_dropped_classifier_is_freed_without_the_collector(bundle, images):
    gc.disable()
    try:
        classifier = Classifier(bundle)
        classifier.profile(rounds=1)
        classifier.predict_batch(images, mean_latency_ms=1e6)
        list(classifier.stream(images[0]))
        gone = weakref.ref(classifier)
        del classifier
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_all_cores_are_those_that_the_process_may_use(bundle):
    """In a container, or below taskset, more threads would fight for them."""
    code = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from edgeke.device.classifier import Classifier\n"
        "from edgeke.device.profile import processor\n"
        "before = len(os.listdir('/proc/self/task')); Classifier(sys.argv[1], threads=0)\n"
        "print(len(os.listdir('/proc/self/task')) - before, processor())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, bundle], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("0 ")
    assert ", 1 cores, " in done.stdout


RELOAD = """
import gc, sys
from edgeke.device.classifier import Classifier
def used():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
def reload(times):
    for _ in range(times):
        classifier = Classifier(sys.argv[1]); classifier.open_segments()
gc.disable(); reload(300); before = used(); reload(700); print(used() - before)
"""


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_reloads(bundle):
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, bundle], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 5


def test_the_longest_path_is_run_once_on_opening(bundle, images, monkeypatch):
    """So that the first image takes no longer than others."""
    ran = []
    run = Classifier._warm_up
    monkeypatch.setattr(
        Classifier, "_warm_up", lambda self, session: ran.append(session) or run(self, session)
    )
    classifier = Classifier(bundle)
    classifier.predict(images[0])
    assert ran == [classifier._session]


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({}, "needs numpy and onnxruntime on a device; run: pip install numpy onnxruntime"),
        ({"numpy": "1.26.4"}, "needs onnxruntime on a device; run: pip install onnxruntime"),
        ({"numpy": "1.26.4", "onnxruntime": "1.14.1"}, "1.15 or newer, and this is 1.14.1"),
        ({"numpy": "2.2.6", "onnxruntime": "1.18.1"}, "needs numpy below 2, and numpy 2.2.6 is"),
        ({"numpy": "2.2.6", "onnxruntime": "1.19.0"}, ""),
        ({"numpy": "1.26.4", "onnxruntime": "1.15.1"}, ""),
        ({"numpy": "2.2.6", "onnxruntime": ""}, ""),
    ],
)  # fmt: skip
def test_what_is_missing_or_too_old_is_named(tmp_path, versions, words):
    """Packages are stubs on a path of their own, as pip leaves them."""
    for name, version in versions.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
        if version:
            (tmp_path / f"{name}-{version}.dist-info").mkdir()
            text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-S", "-m", "edgeke.device", "info", "."],
        env=path, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert (words or "imported") in done.stderr


def test_an_old_python_is_told_what_is_needed():
    """What it reads before has no syntax and no types that 3.8 lacks."""
    import ast

    for name in ("__init__.py", "device/__init__.py", "device/needs.py"):
        text = (ROOT / "edgeke" / name).read_text()
        ast.parse(text, feature_version=(3, 8))
        assert "list[" not in text
    for argv, start in (("['-m']", "error: EdgeKE needs Python 3.11"), ("['a.py']", "Traceback")):
        code = f"import sys; sys.version_info = (3, 9, 2); sys.argv = {argv}; import edgeke.device"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.stderr.startswith(start)
        assert "needs Python 3.11 or newer, and this is 3.9.2; install" in done.stderr
    assert needs.unmet() == ""


def test_onnxruntime_imported_first_is_warned_about(tmp_path):
    kept = {key: value for key, value in os.environ.items() if key[:4] not in ("ORT_", "XDG_")}
    for lines, warns, files in (
        ("import onnxruntime, edgeke.device", True, None),
        ("import edgeke.device, onnxruntime", False, []),
    ):
        for setting in ({}, {"ORT_DISABLE_TELEMETRY": ""}):
            home = tmp_path / f"{warns}{len(setting)}"
            home.mkdir()
            done = subprocess.run(
                [sys.executable, "-c", lines], env={**kept, **setting, "HOME": str(home)},
                cwd=ROOT, capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert ("set ORT_DISABLE_TELEMETRY=1" in done.stderr) == warns
            assert files is None or list(home.rglob("*")) == files
