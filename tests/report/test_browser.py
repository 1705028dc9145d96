"""The page in a real browser: drawn, quiet, within its width, readable, and deaf to names."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from stochastic_depth.report.page import page as rendered
from stochastic_depth.report.sections import report
from stochastic_depth.report.sources import read_sources
from stochastic_depth.report.write import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, BROWSERS), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

CONTRASTS = (Path(__file__).parent / "contrast.js").read_text()
THEMES = ("light", "dark")
WIDTHS = (380, 1440)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(compared, survival_sweep, depth_sweep, benchmark_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report([compared, survival_sweep, depth_sweep, benchmark_file], out)
    return out


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
def test_every_figure_is_drawn_and_nothing_is_wider_than_the_page(written, opened, width):
    page = opened(written, width)
    figures = page.locator("figure")
    assert figures.count() == 10
    drawn = page.evaluate(
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
    page.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_all_text_has_a_contrast_of_at_least_4_5(written, opened, width, theme):
    page = opened(written, width, theme)
    page.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    height = page.evaluate("document.documentElement.scrollHeight")
    page.set_viewport_size({"width": width, "height": height})
    texts = page.evaluate(CONTRASTS)
    assert len(texts) > 300
    assert len({background for _, _, background, _ in texts}) > 3  # cells of the heat map too
    low = [text for text in texts if text[0] < 4.5]
    assert low == []


def test_dark_is_dark_and_print_is_light(written, opened):
    page = opened(written, theme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(20, 23, 28)"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    shown = "document.querySelector('.wide').checkVisibility()"
    assert page.evaluate(shown)


@pytest.mark.parametrize("id", ["training-curves", "depth-sweep", "training-time"])
def test_the_number_behind_a_mark_is_told_on_hover(written, opened, id):
    page = opened(written)
    mark = page.locator(f"figure[id$={id}] .wide [role=graphics-symbol][aria-label]").last
    mark.scroll_into_view_if_needed()
    tip = page.locator("#tip")
    assert not tip.is_visible()
    box = mark.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip.is_visible()
    assert tip.inner_text() == mark.get_attribute("aria-label")
    page.mouse.move(2, 2)
    assert not tip.is_visible()


def test_the_data_of_a_figure_is_a_download(written, opened):
    page = opened(written)
    with page.expect_download() as downloading:
        page.locator("figure[id$=training-curves] a[download]").click()
    assert downloading.value.suggested_filename.endswith("training-curves.csv")
    assert downloading.value.path().read_text().startswith("series,run,seed,epoch,train_loss")


def test_names_do_nothing(hostile, opened, tmp_path):
    name, folder = hostile
    out = tmp_path / "report.html"
    write_report([folder], out)
    page = opened(out)
    page.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    assert page.title() == "ResNet-14 on digits, 2 epochs"
    assert page.locator("img").count() == 0
    assert page.get_by_text(name).first.is_visible()
    page.mouse.move(700, 900)


def test_a_page_of_runs_under_way_loads_itself_anew_and_keeps_what_is_open(
    compared, opened, tmp_path
):
    sources = read_sources([compared])
    before, out = report(sources), tmp_path / "report.html"
    out.write_text(rendered(before, sources, refresh=1))
    page = opened(out)
    page.locator("summary").first.click()
    out.write_text(out.read_text().replace("<h1>", "<h1>Later: "))
    page.get_by_text("Later: ").wait_for()
    assert page.locator("details").first.get_attribute("open") is not None
