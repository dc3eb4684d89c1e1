"""Headless Chromium, for tests of the page and for its picture."""

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PATIENCE = 180.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium() -> str | None:
    """The program, where there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """Headless Chromium, spoken to through two pipes in its own protocol (DevTools): no driver is needed."""

    def __init__(self, program: str, profile: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()

        def joined() -> None:  # the protocol's ends are the file descriptors 3 and 4
            ends = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        words = ["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        words += [
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        nowhere = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [program, *words], close_fds=False, preexec_fn=joined, stdout=nowhere, stderr=nowhere
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.reader, self.writer = os.fdopen(ours_in, "rb", 0), os.fdopen(ours_out, "wb", 0)
        self.rest, self.count, self.session, self.events = b"", 0, "", []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **values: Any) -> Any:
        self.count += 1
        message = {"id": self.count, "method": method, "params": values}
        message |= {"sessionId": self.session} if self.session else {}
        self.writer.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select.select([self.reader], [], [], PATIENCE)[0], "Chromium does not answer."
            more = os.read(self.reader.fileno(), 1 << 20)
            assert more, "Chromium has gone."
            self.rest += more
        text, _, self.rest = self.rest.partition(b"\0")
        answer = json.loads(text)
        if "method" in answer:
            self.events.append(answer)
        return answer

    def ask(self, script: str) -> Any:
        """The value of an expression, which may be a promise."""
        got = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def until(self, script: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self._holds(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.1)

    def _holds(self, script: str) -> bool:
        try:
            return bool(self.ask(script))
        except AssertionError:  # between two pages there is nobody to ask
            return False

    def open(self, path: Path, *, width: int = 1200, height: int = 3000) -> None:
        """The page on a screen that shows all of it: what is out of sight is not drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 800
        )
        self.ask("window.before = true")
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.until(
            "!window.before && document.readyState === 'complete' && document.querySelectorAll('canvas').length > 0"
        )

    def complaints(self) -> list[Any]:
        """Exceptions, errors in the console or the log, and everything that was asked of a network."""
        self.ask("1")
        found = [e for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        said = [e["params"] for e in self.events if e["method"] == "Runtime.consoleAPICalled"]
        logged = [e["params"]["entry"] for e in self.events if e["method"] == "Log.entryAdded"]
        found += [call for call in said if call["type"] == "error"]
        found += [entry for entry in logged if entry["level"] == "error"]
        requests = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return found + [url[:80] for url in requests if not url.startswith(("file:", "data:", "blob:"))]
