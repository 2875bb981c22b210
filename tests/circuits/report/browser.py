"""A headless Chromium that tests drive through its DevTools protocol, over two pipes and without further packages."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """One page of a browser; what it loads besides the page, and what goes wrong there, is noted."""

    def __init__(self, writing: int, reading: int) -> None:
        self._writing, self._reading = writing, reading
        self._buffer = b""
        self._id = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        self._frame: str | None = None  # the session of the page's frame
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
        self.size(1280, 900)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._id:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._reading, 1 << 20)
            assert part, "the browser ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, params: Mapping[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(f"dialog {params['message']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Target.attachedToTarget" and params["targetInfo"]["type"] == "iframe":
            self._frame = params["sessionId"]
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, path: Path, hash: str = "") -> None:
        """Load a file from the disk, and wait until it stands."""
        self.errors.clear()
        self.requests.clear()
        # By way of an empty page, as another hash alone would load nothing.
        for url in ("about:blank", path.as_uri() + (f"#{hash}" if hash else "")):
            self._loaded, self._frame = False, None
            self.call("Page.navigate", url=url)
            while not self._loaded:
                self._next()
        self.settle()

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Scripts run in the page's frame, which has a process of its own as its origin is another."""
        while self._frame is None:
            self._next()
        outer, self._session = self._session, self._frame
        try:
            for domain in ("Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
            yield
        finally:
            self._session = outer

    def settle(self) -> None:
        """Wait until what was changed is drawn."""
        self.run(
            "new Promise(done => { const drawing = e => e?.graph.pending || e?.store.waiting || e?.sizes.waiting,"
            " look = () => drawing(window.explorer) ? requestAnimationFrame(look) : done();"
            " requestAnimationFrame(() => requestAnimationFrame(look)); })"
        )

    def size(self, width: int, height: int, phone: bool = False) -> None:
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )

    def media(self, scheme: str = "light", kind: str = "") -> None:
        self.call(
            "Emulation.setEmulatedMedia", media=kind, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    def mouse(self, kind: str, x: float, y: float, pressed: bool = False) -> None:
        """kind: "Pressed", "Released" or "Moved"."""
        button = "left" if pressed or kind != "Moved" else "none"
        held = 1 if pressed or kind == "Pressed" else 0
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button=button, buttons=held, clickCount=1)

    def click(self, x: float, y: float) -> None:
        self.mouse("Moved", x, y)
        self.mouse("Pressed", x, y)
        self.mouse("Released", x, y)
        self.settle()

    def key(self, key: str) -> None:
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                text=text if kind == "keyDown" else "",
                windowsVirtualKeyCode=code,
            )
        self.settle()

    def shot(self, path: Path, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a new profile in the folder; skips the test if there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no chromium (apt-get install chromium)")
    # The browser reads commands from file 3 and answers on file 4.
    commands, writing = os.pipe()
    reading, answers = os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (commands, answers)]
    options = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-extensions --disable-background-networking"
    )
    command = f'exec "$0" {options} --remote-debugging-pipe --user-data-dir="$1" 3<&{ends[0]} 4>&{ends[1]}'
    process = subprocess.Popen(
        ["bash", "-c", command, program, str(folder / "profile")], pass_fds=ends, stderr=subprocess.DEVNULL
    )
    for end in (commands, answers, *ends):
        os.close(end)
    try:
        yield Browser(writing, reading)
    finally:
        os.close(writing)
        os.close(reading)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
