"""The site is built without a fault, and a real browser reads it: phone, search, no outside requests."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser import WIDTHS, chromium, opened, scrolls_sideways

#: Pages of each kind: prose, wide tables, generated lists, API, drawings, a file of the source.
PAGES = (
    "",
    "readme/",
    "reference/settings/",
    "reference/commands/",
    "reference/metrics/",
    "reference/memory-and-time/",
    "reference/tested-combinations/",
    "explanation/architecture/",
    "api/losses/",
    "results/numbers/",
    "source/rime_pl/modules/cma.py/",
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *words: Any) -> None:
        return


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the site, built inside the checkout, because its settings say where that is."""
    chromium()
    pytest.importorskip("zensical")
    from docs.site.build import ROOT, build

    html = build(ROOT / "build/site-of-tests")
    handler = functools.partial(Quiet, directory=str(html))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_a_phone_and_ask_nobody_outside(width: int, address: str) -> None:
    with opened(address, width) as page:
        for place in PAGES:
            found = page.goto(address + place)
            assert found.ok, place
            assert not scrolls_sideways(page), f"{place} is wider than {width} pixels"
            broken = "[...document.images].filter((one) => one.complete && one.naturalWidth === 0).length"
            assert page.evaluate(broken) == 0, place
            edits = page.locator("a[title*='Edit'], a[title*='View source']")
            assert edits.count() == 0, f"{place} has a link to a host that shows the source"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_search_finds_the_decisive_term(width: int, address: str) -> None:
    with opened(address, width) as page:
        page.keyboard.press("/")
        page.wait_for_selector("input:focus")  # inside the shadow of the search
        page.keyboard.type("decisive term")
        page.wait_for_selector("text=/^[0-9]+ results$/")
        assert page.locator("mark", has_text="decisive").count() > 0


def test_the_reference_was_made(address: str) -> None:
    with opened(address) as page:
        page.goto(address + "reference/settings/#model.lambda_dec")
        assert "Weight of the decisive term" in page.inner_text("article")
        page.goto(address + "api/losses/")
        text = page.inner_text("article")
        assert "decisive_rewrite" in text and "softplus" in text and ":func:" not in text
        page.goto(address + "explanation/architecture/")
        assert page.locator("article img").count() == 2
