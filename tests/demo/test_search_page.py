"""The search page in a real browser: keyboard, drop and paste, a phone, hostile captions."""

from __future__ import annotations

import time

import pytest
from PIL import Image

from rime_pl.demo.searcher import IndexSearcher, Pictures
from rime_pl.types import MODE_PAIRS, Clip, Item
from tests.browser import WIDTHS, opened, scrolls_sideways, until
from tests.demo.conftest import SCRIPT, MadeUp, Serve, png

#: Gives the page a file as a drag from the desktop does, or the clipboard.
HAND_OVER = """([event, name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
  const given = event === "paste" ? { clipboardData: data } : { dataTransfer: data };
  const sent = event === "paste" ? new ClipboardEvent(event, { ...given, bubbles: true, cancelable: true })
    : new DragEvent(event, { ...given, bubbles: true, cancelable: true });
  document.body.dispatchEvent(sent);
  return sent.defaultPrevented;
}"""


@pytest.mark.parametrize("width", WIDTHS)
def test_a_query_by_keyboard_alone_fills_four_columns(
    width: int, index_searcher: IndexSearcher, serve: Serve
) -> None:
    with opened(serve(index_searcher), width) as page:
        page.keyboard.type("a red ring")  # the field has the focus from the beginning
        page.keyboard.press("Enter")
        page.wait_for_selector("#disc-gen li")
        for pair in MODE_PAIRS:
            assert page.locator(f"#{pair} li").count() == 3
            assert "query " in (times := page.inner_text(f"#{pair} .times")) and times.endswith(" ms")
        found = index_searcher.index.search("a red ring", "generative")
        assert page.text_content("#rewrite") == found.rewrite
        assert "discriminative scores differ by" in page.inner_text("#adaptive")
        assert page.inner_text("#status") == "Found" and page.inner_text("#error") == ""
        until(page, "[...document.images].every((one) => one.hidden || one.complete)")
        shown = page.evaluate("[...document.querySelectorAll('li img')].map((one) => one.naturalWidth)")
        assert len(shown) >= 8 and min(shown) > 0
        assert not scrolls_sideways(page)
        names = page.locator("#gen-gen li span").all_inner_texts()
        best = index_searcher.index.search("a red ring", "generative", "generative", 3).hits
        assert names == [hit.name for hit in best]


def test_everything_is_reached_with_the_tab_key(made_up: MadeUp, serve: Serve) -> None:
    with opened(serve(made_up)) as page:
        page.keyboard.type("x")
        page.keyboard.press("Enter")
        page.wait_for_selector("#gen-disc li")
        reached = []
        for _ in range(8):
            reached.append(
                page.evaluate("(document.activeElement.id || document.activeElement.parentElement.id)")
            )
            page.keyboard.press("Tab")
        assert reached[0] == "text" and "file" in reached and set(MODE_PAIRS) <= set(reached)


@pytest.mark.parametrize("width", WIDTHS)
def test_captions_and_rewrites_are_shown_as_text(width: int, made_up: MadeUp, serve: Serve) -> None:
    with opened(serve(made_up), width) as page:
        page.fill("#text", "x")
        page.click("form button[type=submit]")
        page.wait_for_selector("#gen-disc li")
        for place in ("#rewrite", "#adaptive", "#disc-disc li p", "#disc-disc li span", "#gen-gen li small"):
            assert page.text_content(place) == SCRIPT
        assert SCRIPT in page.text_content("header") and SCRIPT in page.title()
        assert page.locator("script").count() == 1 and page.locator("img[src=x]").count() == 0
        assert page.inner_text("#disc-gen .times") == "None here."
        assert page.inner_text("#gen-disc .times") == "query 1.0 ms, search 2.00 ms"
        assert not scrolls_sideways(page)


def test_a_clip_is_seen_to_move(made_up: MadeUp, serve: Serve) -> None:
    frames = tuple(Image.new("RGB", (64, 48), colour) for colour in ("red", "lime", "blue", "black"))
    shown = Pictures([Item("", (Clip(frames, (0.0, 1.0, 2.0, 3.0)),))])
    made_up.picture = shown.picture  # type: ignore[method-assign]
    made_up.pictured = True
    with opened(serve(made_up)) as page:
        page.keyboard.type("x")
        page.keyboard.press("Enter")
        until(
            page, "[...document.querySelectorAll('#disc-disc li img')].some((one) => one.naturalWidth === 64)"
        )
        picture, looks = page.locator("#disc-disc li img"), set()
        end = time.monotonic() + 20
        while len(looks) < 2 and time.monotonic() < end:
            looks.add(picture.screenshot())
            page.wait_for_timeout(100)
        assert len(looks) > 1


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted(event: str, made_up: MadeUp, serve: Serve) -> None:
    with opened(serve(made_up)) as page:
        assert page.evaluate(HAND_OVER, [event, "red.png", list(png((64, 48)))])
        until(page, "document.getElementById('preview').naturalWidth === 64")
        page.click("form button[type=submit]")
        page.wait_for_selector("#gen-disc li")
        assert made_up.asked[-1].media[0].size == (64, 48) and made_up.asked[-1].text == ""
        page.click("#clear")
        assert page.is_hidden("#preview") and page.input_value("#file") == ""
        page.click("form button[type=submit]")
        until(page, "document.getElementById('error').textContent !== ''")
        assert "Type some words, or choose a picture" in page.inner_text("#error")


def test_what_goes_wrong_is_told_on_the_page(made_up: MadeUp, serve: Serve) -> None:
    with opened(serve(made_up)) as page:
        assert page.evaluate(HAND_OVER, ["drop", "<b>cut.png", list(png((300, 300))[:120])])
        page.click("form button[type=submit]")
        until(page, "document.getElementById('error').textContent !== ''")
        assert page.inner_text("#error").startswith("<b>cut.png is cut off")
        assert not page.is_visible("#answer") and page.is_enabled("form button[type=submit]")
