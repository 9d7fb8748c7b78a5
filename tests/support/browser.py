"""Opens pages in the system's Chromium and measures what a reader sees."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

AUDIT = (Path(__file__).parent / "browser_audit.js").read_text(encoding="utf-8")


@contextmanager
def chromium() -> Iterator[Any]:
    """The system's Chromium; skips the test if it or playwright is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    with api.sync_playwright() as playwright:
        # Chromium's sandbox refuses to run as root, which containers are; the pages are our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class OpenedPage:
    """A page with everything it reported and requested while it was opened."""

    def __init__(self, browser: Any, file: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.events: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.events.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.events.append(f"error: {error}"))
        self.page.on("requestfailed", lambda request: self.events.append(f"failed: {request.url}"))
        self.page.on("dialog", lambda dialog: (self.events.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")

    def __enter__(self) -> "OpenedPage":
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()

    def audit(self, check: str, *arguments: object) -> Any:
        """Result of one function of `browser_audit.js`."""
        return self.page.evaluate(f"arguments_ => {{ {AUDIT}\nreturn {check}(...arguments_) }}", list(arguments))
