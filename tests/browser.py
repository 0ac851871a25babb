"""A headless Chromium, controlled by its own protocol through a pair of pipes."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
# It reads from its descriptor 3, and writes to 4.
LAUNCH = """
import fcntl, os, sys
theirs = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for fd, there in zip(theirs, (3, 4)):
    os.dup2(fd, there)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One tab, and the errors that it reported."""

    def __init__(self, folder, seconds=60):
        self.seconds = seconds
        self.complaints, self.requests = [], []
        self._count, self._rest = 0, b""
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(theirs_in), str(theirs_out), CHROMIUM, *FLAGS,
             f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._session = None
        try:
            self._attach()
        except BaseException:
            self.__exit__()
            raise

    def _attach(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(30)
        os.close(self._in)
        os.close(self._out)

    def call(self, method, **params):
        """The answer to one request; other messages of the browser are stored."""
        self._count += 1
        request = {"id": self._count, "method": method, "params": params}
        if self._session:
            request["sessionId"] = self._session
        os.write(self._out, json.dumps(request).encode() + b"\0")
        deadline = time.monotonic() + self.seconds
        while True:
            message = self._message(deadline)
            if message.get("id") == self._count:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._take(message)

    def _message(self, deadline):
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            assert ready, "the browser did not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has gone"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _take(self, event):
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", details).get("description", details))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append([a.get("value", a.get("description")) for a in params["args"]])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def look(self, width=1200, height=900, dark=False):
        """Set the size of the window, and the colour scheme that its user prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path):
        """Open a local page, and wait until it has drawn all its charts."""
        self.complaints, self.requests = [], []
        self.call("Page.navigate", url=f"file://{path}")
        self.wait("document.readyState === 'complete'")
        self.settle()

    def settle(self):
        """Wait until every visible chart has been drawn, and none is being drawn."""
        self.wait(
            "typeof page !== 'undefined' && !page.working() && "
            "[...document.querySelectorAll('.chart')].every((chart) => "
            "!chart.offsetParent || chart.dataset.drawn)"
        )

    def wait(self, condition):
        """Wait until an expression on the page is true."""
        deadline = time.monotonic() + self.seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < deadline, (condition, self.complaints)
            time.sleep(0.005)

    def run(self, expression):
        """The value of an expression on the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def drawn(self, name):
        """The SVG of a chart, without the numbers that change with every drawing."""
        return self.run(f"document.querySelector('#chart-{name} svg')?.innerHTML")

    def choose(self, selector, value=None):
        """Click on an element; or set a select or a slider to a value, as a user would."""
        if value is None:
            self.run(f"document.querySelector({json.dumps(selector)}).click()")
        else:
            self.run(
                f"(() => {{ const it = document.querySelector({json.dumps(selector)});"
                f"it.value = {json.dumps(str(value))};"
                "for (const type of ['input', 'change']) it.dispatchEvent(new Event(type)); })()"
            )
        self.settle()

    def press(self, key, code):
        """Press a key, for the element that has the focus."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )
        self.settle()

    def screenshot(self, path):
        """The whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip
        )
        path.write_bytes(base64.b64decode(shot["data"]))
