"""The page in a real browser: drawn, quiet, within its width, readable, and deaf to names."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from stochastic_depth.files import write_whole

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, BROWSERS), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

CONTRASTS = (Path(__file__).parent / "contrast.js").read_text()
THEMES = ("light", "dark")
WIDTHS = (380, 1440)
expect = playwright.expect


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Open a page; whatever it says or asks for besides itself fails the test."""
    contexts, noise = [], []

    def open_page(path: Path, width: int = 1440, theme: str = "light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("dialog", lambda dialog: noise.append(dialog.message))
        page.on(
            "request",
            lambda asked: (
                asked.url == path.as_uri()
                or asked.url.startswith("data:")
                or noise.append(asked.url)
            ),
        )
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert noise == []


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_is_drawn_and_nothing_is_wider_than_the_page(page, opened, width):
    tab = opened(page, width)
    figures = tab.locator("figure")
    assert figures.count() == 11
    drawn = tab.evaluate(
        """() => [...document.querySelectorAll("figure")].map((figure) => {
          const drawings = [...figure.querySelectorAll(".drawing svg")];
          const shown = drawings.filter((svg) => svg.checkVisibility());
          const box = shown[0].getBoundingClientRect();
          const marks = shown[0].querySelectorAll("[role=graphics-symbol][aria-label]");
          const seen = [...marks].filter((mark) => mark.getBoundingClientRect().width
                                                 + mark.getBoundingClientRect().height > 0);
          return [figure.id, shown.length, box.width, box.height, seen.length];
        })"""
    )
    for name, shown, across, along, marks in drawn:
        assert shown == 1, name
        assert across > 0.6 * min(width, 800), name
        assert along > 60, name
        assert marks >= 2, name
    tab.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_all_text_has_a_contrast_of_at_least_4_5(page, opened, width, theme):
    tab = opened(page, width, theme)
    tab.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    height = tab.evaluate("document.documentElement.scrollHeight")
    tab.set_viewport_size({"width": width, "height": height})
    texts = tab.evaluate(CONTRASTS)
    assert len(texts) > 300
    assert len({background for _, _, background, _ in texts}) > 3  # cells of the heat map too
    low = [text for text in texts if text[0] < 4.5]
    assert low == []


@pytest.mark.parametrize("width", [380, 700, 1440])
def test_a_number_in_large_type_is_on_one_line_and_within_its_tile(page, opened, width):
    lines, overflow = opened(page, width).evaluate(
        """() => {
          const value = document.querySelector(".tile .value");
          value.textContent = "61.30 \u00b1 12.02 %";
          const line = parseFloat(getComputedStyle(value).lineHeight);
          return [value.clientHeight / line, value.scrollWidth - value.clientWidth];
        }"""
    )
    assert lines == pytest.approx(1, abs=0.1)
    assert overflow <= 0


def test_dark_is_dark_and_print_is_light(page, opened):
    tab = opened(page, theme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(paper) == "rgb(20, 23, 28)"
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate(paper) == "rgb(255, 255, 255)"
    shown = "document.querySelector('.wide').checkVisibility()"
    assert tab.evaluate(shown)


@pytest.mark.parametrize("id", ["training-curves", "depth-sweep", "training-time"])
def test_the_number_behind_a_mark_is_told_on_hover(page, opened, id):
    tab = opened(page)
    mark = tab.locator(f"figure[id$={id}] .wide [role=graphics-symbol][aria-label]").last
    mark.scroll_into_view_if_needed()
    tip = tab.locator("#tip")
    assert not tip.is_visible()
    box = mark.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip.is_visible()
    assert tip.inner_text() == mark.get_attribute("aria-label")
    tab.mouse.move(2, 2)
    assert not tip.is_visible()


def test_the_data_of_a_figure_is_a_download(page, opened):
    tab = opened(page)
    with tab.expect_download() as downloading:
        tab.locator("figure[id$=training-curves] a[download]").click()
    assert downloading.value.suggested_filename.endswith("training-curves.csv")
    assert downloading.value.path().read_text().startswith("series,run,seed,epoch,train_loss")


def test_names_do_nothing(hostile, hostile_page, opened):
    tab = opened(hostile_page)
    tab.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    assert tab.title() == "ResNet-14 on digits, 2 epochs"
    assert tab.locator("img").count() == 0
    assert tab.get_by_text(hostile[0]).first.is_visible()


def test_a_page_of_runs_under_way_reloads_and_keeps_what_is_open(page, opened, tmp_path):
    out = tmp_path / "report.html"
    write_whole(out, page.read_bytes().replace(b"<html ", b'<html data-refresh="1" '))
    tab = opened(out)
    tab.locator("summary").first.click()
    write_whole(out, out.read_bytes().replace(b"<h1>", b"<h1>Later: "))
    tab.get_by_text("Later: ").wait_for()
    # The heading is seen before the script has run.
    expect(tab.locator("details[open]")).to_have_count(1, timeout=30_000)
    expect(tab.locator("details").first).to_have_attribute("open", "", timeout=30_000)


def test_what_is_opened_while_the_page_reloads_is_kept(page, opened, tmp_path):
    out = tmp_path / "report.html"
    write_whole(out, page.read_bytes().replace(b"<html ", b'<html data-refresh="900" '))
    tab = opened(out)
    with tab.expect_navigation():
        tab.evaluate("location.reload(); document.querySelector('details').open = true")
    assert tab.locator("details[open]").count() == 1
    with tab.expect_navigation():
        tab.evaluate("location.reload(); document.querySelector('details').open = false")
    assert tab.locator("details[open]").count() == 0
