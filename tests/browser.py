"""Headless Chromium, driven over its DevTools protocol.

PYTHONPATH=tests python -m browser http://127.0.0.1:8000 docs/pictures  takes docs/serving.md's
pictures of a server of the digits, with onnxruntime-web (`make web`).
"""

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

# Every host but this machine is unknown: a page that needs another one fails.
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--remote-debugging-port=0", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "about:blank",
)  # fmt: skip


class Page:
    """One tab. `faults`: what its console and Chromium complained of."""

    def __init__(self, url: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._ids, self.faults = loop, itertools.count(1), list[str]()
        self._session, self._socket = loop.run_until_complete(self._connect(url))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    async def _connect(self, url: str) -> Any:
        session = aiohttp.ClientSession()
        return session, await session.ws_connect(url, max_msg_size=0)

    def close(self) -> None:
        self._loop.run_until_complete(self._session.close())

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), 60))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            about = message.get("params", {})
            if message.get("method") == "Runtime.exceptionThrown":
                self.faults.append(json.dumps(about["exceptionDetails"]))
            if message.get("method") == "Log.entryAdded" and about["entry"]["level"] == "error":
                self.faults.append(f"{about['entry']['text']} {about['entry'].get('url')}")
            if message.get("method") == "Runtime.consoleAPICalled" and about["type"] == "error":
                self.faults.append(json.dumps(about["args"]))

    def go(self, url: str) -> None:
        """Open an address."""
        self.call("Page.navigate", url=url)

    def js(self, expression: str) -> Any:
        """The value of an expression, awaited."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Wait until an expression is true; one that fails is not yet."""
        safe = f"(() => {{ try {{ return Boolean({condition}) }} catch {{ return false }} }})()"
        end = time.monotonic() + seconds
        while not self.js(safe):
            assert time.monotonic() < end, (condition, self.js("document.body.innerText"))
            time.sleep(0.05)

    def text(self, element: str) -> str:
        """An element's text, as it is shown."""
        return str(self.js(f"document.getElementById('{element}').innerText"))

    def press(self, key: str, code: int) -> None:
        """A key, as a keyboard sends it."""
        text = {"Enter": "\r", " ": " "}.get(key)
        more = {"text": text} if text else {}
        key_of = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key_of, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key_of)

    def give_file(self, selector: str, file: Path) -> None:
        """Choose a file in a field."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def resize(self, width: int, height: int) -> None:
        """As a window, or a phone, of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", mobile=width < 600, **size)

    def picture(self, file: Path) -> None:
        """A PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A tab of a fresh Chromium; the test is skipped where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs chromium (Debian: chromium)")
    command = [program, f"--user-data-dir={folder}", *_FLAGS]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    loop = asyncio.new_event_loop()
    try:
        ports, end = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (ports.is_file() and "\n" in ports.read_text()):
            assert process.poll() is None, "chromium ended"
            assert time.monotonic() < end, "chromium did not start"
            time.sleep(0.05)
        port = ports.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as tabs:
            url = next(tab for tab in json.load(tabs) if tab["type"] == "page")
        page = Page(url["webSocketDebuggerUrl"], loop)
        try:
            yield page
        finally:
            page.close()
    finally:
        process.terminate()
        process.wait(30)
        loop.close()


def take_pictures(url: str, folder: Path) -> None:
    """The page on a desktop, asking the server, and on a phone that runs the model itself."""
    answered = "Number(document.body.dataset.answered)"
    with tempfile.TemporaryDirectory() as name, chromium(Path(name)) as page:
        page.resize(1100, 720)
        page.go(url)
        page.wait("document.querySelectorAll('#samples button').length == 12")
        page.js("document.getElementById('degradation').value = 14")
        page.js("document.getElementById('all').click()")
        page.wait(f"{answered} == 12", 120)
        time.sleep(2)  # the next count of exits
        page.picture(folder / "page_desktop.png")
        page.resize(390, 844)
        page.js("document.getElementById('browser').click()")
        page.wait(f"{answered} == 13", 120)
        page.js("document.getElementById('all').click()")
        page.wait(f"{answered} == 25", 120)
        page.picture(folder / "page_phone.png")


if __name__ == "__main__":
    take_pictures(sys.argv[1], Path(sys.argv[2]))
