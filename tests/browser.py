"""A headless Chromium, spoken to over a pipe: the DevTools protocol is JSON objects with a zero byte after each."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
OPTIONS += ["--no-first-run", "--window-size=1600,6000"]  # tall: much is drawn only when it comes into view

# Whatever is written on the page, and the titles of elements, also inside of web components.
TEXT = """(() => {
    const found = [];
    const walk = node => {
        if (node.shadowRoot) walk(node.shadowRoot);
        for (const child of node.childNodes) {
            if (child.nodeType === Node.TEXT_NODE) found.push(child.data.trim());
            else if (child.nodeName !== "STYLE") { found.push(child.title); walk(child); }
        }
    };
    walk(document.body);
    return found;
})()"""


class Browser:
    """A context manager; ``profile`` is an empty folder."""

    def __init__(self, profile: Path) -> None:
        from_us, self._out = os.pipe()
        self._in, to_us = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4.
        command = [f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}', str(CHROMIUM), *OPTIONS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            ["bash", "-c", *command],
            pass_fds=(from_us, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(from_us)
        os.close(to_us)
        self._unread = b""
        self._number = 0

    def _call(self, method: str, session: str | None = None, **parameters: object) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            while b"\0" not in self._unread:
                data = os.read(self._in, 65_536)
                assert data, "the browser has gone"
                self._unread += data
            line, _, self._unread = self._unread.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "result" in answer, answer
                return answer["result"]

    def missing(self, url: str, texts: list[str], seconds: float = 60) -> list[str]:
        """Open a page and wait until it shows all ``texts``; those that it does not show in time."""
        target = self._call("Target.createTarget", url=url)["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        deadline = time.monotonic() + seconds
        while True:
            found = self._call("Runtime.evaluate", session, expression=TEXT, returnByValue=True)["result"].get("value")
            left = [text for text in texts if text not in (found or [])]
            if not left or time.monotonic() > deadline:
                self._call("Target.closeTarget", targetId=target)
                return left
            time.sleep(0.2)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._call("Browser.close")
        self._process.wait(timeout=30)
        os.close(self._out)
        os.close(self._in)
