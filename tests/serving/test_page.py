"""The page at `/`, as Chromium shows it."""

import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from browser import Page, chromium
from PIL import Image

from edgeke.device.choice import Request, UnmetError, choose
from edgeke.device.classifier import Classifier
from edgeke.device.decode import read_image
from edgeke.serving.page import FILES, RUNTIME

needs_runtime = pytest.mark.skipif(
    not RUNTIME.is_file(), reason="needs onnxruntime-web (run make web)"
)
_ANSWERED = "Number(document.body.dataset.answered || 0)"


@pytest.fixture(scope="module")
def shown(toy, images, tmp_path_factory) -> Path:
    """A bundle with three samples."""
    bundle = Path(shutil.copytree(toy, tmp_path_factory.mktemp("shown") / "bundle"))
    (bundle / "samples").mkdir()
    for number in range(3):
        Image.fromarray(images[number, ..., 0]).save(bundle / "samples" / f"{number:02}.png")
    (bundle / "samples" / "stolen.png").symlink_to("/etc/passwd")
    return bundle


@pytest.fixture(scope="module")
def url(shown, start) -> Iterator[str]:
    with start(shown) as running:
        yield running.url


@pytest.fixture(scope="module")
def tab(tmp_path_factory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def opened(tab: Page, url: str) -> Page:
    """The page, ready to be asked."""
    tab.go("about:blank")
    tab.faults.clear()
    tab.go(url)
    tab.wait("document.querySelectorAll('#samples button').length == 3")
    return tab


def after(tab: Page, action: str) -> None:
    """Do something on the page and wait for the answer."""
    count = tab.js(_ANSWERED)
    tab.js(f"void {action}")
    tab.wait(f"{_ANSWERED} > {count}")


def slide(tab: Page, slider: str, place: int | str) -> None:
    element = f"document.getElementById('{slider}')"
    after(tab, f"({element}.value = {place}, {element}.dispatchEvent(new Event('input')))")


def test_all_of_it_comes_from_the_server_under_a_strict_policy(url):
    with urllib.request.urlopen(url) as answer:
        policy, text = answer.headers["content-security-policy"], answer.read().decode()
    assert policy.startswith("default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src")
    assert "unsafe-inline" not in policy
    addresses = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(addresses) == 3
    for address in addresses:
        assert (FILES / address.removeprefix("/page/")).is_file()
        with urllib.request.urlopen(url + address) as answer:
            assert answer.headers["content-security-policy"] == policy
    for path in ("/page/../page.py", "/page/%2e%2e/page.py", "/page/samples/stolen.png"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url + path)


def test_the_server_s_answer_and_the_full_network_s(tab, url, toy, images):
    classifier = Classifier(toy)
    expected, full = classifier.predict(images[1]), classifier.forced(2)(images[1])
    opened(tab, url)
    after(tab, "document.querySelectorAll('#samples button')[1].click()")
    said, facts = tab.text("said"), tab.text("facts")
    assert said.startswith(f"{expected.class_name}, {100 * expected.probabilities.max():.3g}")
    where = f"exit {expected.exit}" if expected.exit < 3 else "vote"
    assert f"{where} of 3" in facts
    assert f"full network\n{full.class_name}, {100 * full.probabilities.max():.3g}" in facts
    tab.wait("document.getElementById('exits').innerText.includes('1 (100 %)')")
    assert not tab.faults
    slide(tab, "deadline", 0)  # 0.1 ms: less than HTTP takes
    assert "cannot be met" in tab.text("said")


def test_a_keyboard_is_enough(tab, url):
    """From the top: the file field, three samples (Enter asks), and the first slider."""
    opened(tab, url)
    tab.js("document.body.focus()")
    for _ in range(2):
        tab.press("Tab", 9)
    tab.press("Enter", 13)
    tab.wait(f"{_ANSWERED} == 1")
    assert tab.js("document.activeElement.firstChild.alt") == "sample 1"
    for _ in range(3):
        tab.press("Tab", 9)
    assert tab.js("document.activeElement.id") == "deadline"
    tab.press("ArrowLeft", 37)
    tab.wait(f"{_ANSWERED} == 2")
    assert tab.js("document.activeElement.getAttribute('aria-valuetext')") == "1000 ms"


@pytest.mark.parametrize("width", [360, 1100])
def test_nothing_is_wider_than_the_window(tab, url, width):
    tab.resize(width, 700)
    opened(tab, url)
    after(tab, "document.querySelector('#samples button').click()")
    assert tab.js("document.documentElement.scrollWidth") <= width


@needs_runtime
def test_the_browser_answers_as_the_device_does(tab, url, toy, images):
    classifier = Classifier(toy)
    opened(tab, url)
    tab.js("document.getElementById('browser').click()")
    for number in range(3):
        expected, full = classifier.predict(images[number]), classifier.forced(2)(images[number])
        after(tab, f"document.querySelectorAll('#samples button')[{number}].click()")
        assert tab.text("said").startswith(
            f"{expected.class_name}, {100 * expected.probabilities.max():.3g}"
        )
        assert f"point {expected.point.name}\n" in tab.text("facts")
        assert f"full network\n{full.class_name}" in tab.text("facts")
    assert tab.text("exits").count("3 (100 %)") == 1
    assert not tab.faults


@needs_runtime
def test_the_browser_chooses_the_point_that_the_device_chooses(tab, url, toy):
    policy = Classifier(toy).policy
    opened(tab, url)
    tab.js("document.getElementById('browser').click()")
    after(tab, "document.querySelector('#samples button').click()")
    module = "(await import('/page/page.js'))"
    costs = tab.js(f"(async () => {module}.timesHere())()")
    assert len(costs["costs"]) == len(costs["worst"]) == 3
    for ms in (None, costs["worst"][0], costs["worst"][1] * 1.01, 1e3, 1e-6):
        for share in (None, 0.01, 0.1, 0.3, 0.6, 0.9):
            call = f"{module}.choose({json.dumps(ms)}, {json.dumps(share)})"
            name = tab.js(f"(async () => {{ try {{ return {call}[0].name }} catch {{}} }})()")
            request = Request(deadline=ms, max_degradation=share)
            try:
                expected = choose(policy, request, costs["costs"], costs["worst"]).name
            except UnmetError:
                expected = None
            assert name == expected, (ms, share)


@pytest.mark.parametrize("size", [(8, 8), (40, 23), (9, 31)])
def test_the_browser_reads_pictures_as_the_device_does(tab, url, tmp_path, size):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    file = tmp_path / "picture.png"
    Image.fromarray(noise).resize(size).save(file)
    opened(tab, url)
    tab.give_file("#file", file)
    tab.wait(f"{_ANSWERED} == 1")
    pixels = tab.js(
        "(async () => { const page = await import('/page/page.js');"
        "const file = document.getElementById('file').files[0];"
        "return [...page.scaled(await page.opened(file))] })()"
    )
    difference = np.abs(np.asarray(pixels) - read_image(file, (8, 8, 1)).ravel().astype(int))
    assert difference.max() <= 1


def test_a_token_is_asked_for(tab, shown, start, tmp_path):
    (tmp_path / "token").write_text("secret")
    with start(shown, "--token-file", str(tmp_path / "token")) as running:
        tab.go(running.url)
        tab.wait("!document.getElementById('login').hidden")
        assert tab.js("document.getElementById('main').hidden")
        for given in ("wrong", "secret"):
            tab.js(f"document.getElementById('token').value = '{given}'")
            tab.js("document.querySelector('#login button').click()")
            if given == "wrong":
                tab.wait("document.getElementById('login_text').textContent.includes('not accept')")
        tab.wait("document.querySelectorAll('#samples button').length == 3")
        after(tab, "document.querySelector('#samples button').click()")
        assert "full network" in tab.text("facts")


def test_names_of_classes_are_text(tab, shown, start, tmp_path):
    bundle = Path(shutil.copytree(shown, tmp_path / "bundle", symlinks=True))
    names = [f"<img src=x onerror=alert({number})>" for number in range(3)]
    manifest = bundle / "segments" / "fp32" / "segments.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"classes": names}))
    model = onnx.load(bundle / "edgeke.onnx")
    for entry in model.metadata_props:
        if entry.key == "classes":
            entry.value = json.dumps(names)
    onnx.save(model, bundle / "edgeke.onnx")
    with start(bundle) as running:
        opened(tab, running.url)
        after(tab, "document.querySelector('#samples button').click()")
        assert tab.text("said").startswith("<img src=x onerror=alert(")
        assert tab.js("document.querySelectorAll('img').length") == 3, "the samples alone"
