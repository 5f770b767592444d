"""The page of `rime report` in a real browser: no script, no request, and a phone can read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rime_pl.__main__ import main
from tests.browser import WIDTHS, opened, scrolls_sideways
from tests.report.pages import SCRIPT, make_run


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    run = make_run(folder / "runs" / "refine_rl", "refine_rl")
    assert main(["report", str(run), "--output", str(folder / "page.html")]) == 0
    return Path(folder / "page.html").as_uri()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_is_read_without_a_script(address: str, width: int) -> None:
    with opened(address, width, java_script_enabled=True) as page:
        assert page.evaluate("document.scripts.length") == 0 and not scrolls_sideways(page)
        assert page.evaluate("[...document.images].every((one) => one.naturalWidth > 0)")
        assert SCRIPT in page.inner_text("#examples") and SCRIPT in page.inner_text("#tasks")
        drawn = page.evaluate(
            "[...document.querySelectorAll('svg')].map((one) => one.getBoundingClientRect().width)"
        )
        assert len(drawn) == 9 and max(drawn) <= width and min(drawn) > 200
        page.click("#settings summary")
        assert "model.init_adapter_from" in page.inner_text("#settings details")
    with opened(address, width, java_script_enabled=False) as page:
        assert "gen-gen: right" in page.inner_text("#examples")
