"""Headless Chromium on pages of a folder, served on this machine."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import threading
from contextlib import contextmanager

import pytest


@contextmanager
def open_browser(folder, profile):
    """Yield a browser on the pages of a folder; skip the test if there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    browser = Browser(program, folder, profile)
    try:
        yield browser
    finally:
        browser.close()


class Browser:
    """Headless Chromium on pages of a folder, served on this machine."""

    FLAGS = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"),
        *("--no-first-run", "--disable-sync", "--disable-component-update", "--disable-background-networking"),
        # Whatever it asks for on its own, no name but ours is looked up.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    )

    def __init__(self, program, folder, profile):
        self.program, self.profile = program, profile
        handler = functools.partial(QuietHandler, directory=folder)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def open(self, name, shot, width=1000, height=3400):
        """Open a page and take its picture; return its DOM and what it asked for."""
        log, origin = self.profile / "net.json", f"http://127.0.0.1:{self.server.server_port}"
        words = [self.program, *self.FLAGS, f"--user-data-dir={self.profile}", f"--log-net-log={log}"]
        words += [f"--window-size={width},{height}", f"--screenshot={shot}", "--dump-dom", f"{origin}/{name}"]
        done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=120)
        parameters = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
        asked = {p["url"] for p in parameters if str(p.get("initiator", "")).startswith(origin) and "url" in p}
        return done.stdout, {url for url in asked if not url.endswith("/favicon.ico")}


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass
