"""A headless browser for the tests of pages, and what it must not do: ask anybody outside.

Where RIME_NEEDS_CHROMIUM is set, as in .ci/run, a missing browser is a failure.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

#: Debian's Chromium, and what else can be driven in the same way.
PLACES = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
WIDTHS = (360, 1280)


def chromium() -> str:
    """Return the path of a browser; without one, skip the test, or fail where one must be."""
    found = next((place for place in PLACES if Path(place).exists()), None)
    if found is None:
        told = f"no browser at {' or '.join(PLACES)}; on Debian: apt-get install chromium"
        if os.environ.get("RIME_NEEDS_CHROMIUM"):
            pytest.fail(told)
        pytest.skip(told)
    return found


@contextmanager
def opened(address: str, width: int = 1280, **context: Any) -> Iterator[Any]:
    """Give a page in a new profile; afterwards no request may have left its origin, and no script failed."""
    executable = chromium()
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS), headless=True)
        page = browser.new_context(viewport={"width": width, "height": 900}, **context).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(address)
        yield page
        page.wait_for_load_state("networkidle")
        browser.close()
    own = urlsplit(address)[:2]
    assert asked and not errors
    assert not [url for url in asked if urlsplit(url)[:2] != own and not url.startswith(("data:", "blob:"))]


def scrolls_sideways(page: Any) -> bool:
    """Return whether the page is wider than the window."""
    wide: bool = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    return wide


def until(page: Any, condition: str, seconds: float = 30) -> None:
    """Wait until a condition in JavaScript holds.

    ``wait_for_function`` evaluates the condition within the page, whose policy forbids that.
    """
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)
