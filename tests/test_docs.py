"""The documentation: its code runs, its site builds, and it fetches nothing."""

import importlib
import importlib.util
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

import stochastic_depth as sd

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE = {name: BLOCK.findall(text) for name, text in PAGES.items() if BLOCK.search(text)}
LIBRARIES = ("timm", "torchvision", "transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def form(text: str) -> list[str]:
    """The lines of `text`, with the same digit for every number, and seconds for milliseconds."""
    text = re.sub(r"-?\d+(\.\d+)?(e-?\d+)?( m?s\b)?", "0", text)
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize("name", CODE)
def test_the_python_of_a_page_runs_from_top_to_bottom(name, tmp_path, monkeypatch, capsys):
    for library in LIBRARIES:
        if any(
            re.search(rf"^(import|from) {library}", block, re.MULTILINE) for block in CODE[name]
        ):
            pytest.importorskip(library, reason=f"needs {library}")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (tmp_path / "page.py").write_text("\n".join(CODE[name]))
    names = {"__name__": "page", "__file__": str(tmp_path / "page.py")}
    source = (tmp_path / "page.py").read_text()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|timm")
        exec(compile(source, tmp_path / "page.py", "exec"), names)
    if name == "tutorial.md":
        printed = form(capsys.readouterr().out)
        shown = re.findall(r"^```text\n(.*?)^```", PAGES[name], re.DOTALL | re.MULTILINE)
        assert len(shown) == 6
        assert not [line for line in form("".join(shown)) if line not in [*printed, "..."]]


def test_the_architecture_lists_the_tree_as_it_is():
    tree = re.search(
        r"^src/stochastic_depth/\n(.*?)^```", PAGES["design/architecture.md"], re.M | re.S
    )
    assert tree
    listed = set(re.findall(r"^  (\w+(?:\.py|/))", tree[1], re.MULTILINE))
    package = ROOT / "src" / "stochastic_depth"
    there = {f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").exists()}
    there |= {p.name for p in package.glob("*.py")} - {"__main__.py"}
    assert listed == there


def test_the_way_of_a_foreign_model_names_files_that_are_there():
    page = PAGES["design/architecture.md"]
    way = page[page.index("### A foreign model") : page.index("## Surgery")]
    files = {path.stem for path in (ROOT / "src" / "stochastic_depth" / "surgery").rglob("*.py")}
    named = set(re.findall(r"`(\w+)`", way)) - {"remove"}
    assert len(named) > 10
    assert named <= files


def resolves(name: str) -> bool:
    """Whether a dotted name of the package is a module, or in one."""
    value: object = sd
    path = name.split(".")
    for length, part in enumerate(path[1:], start=2):
        try:
            value = getattr(value, part)
        except AttributeError:
            if importlib.util.find_spec(".".join(path[:length])) is None:
                return False
            value = importlib.import_module(".".join(path[:length]))
    return True


@pytest.mark.parametrize("name", [*PAGES, "../README.md"])
def test_the_names_and_files_that_a_page_mentions_are_there(name):
    text = (DOCS / name).read_text()
    names = re.findall(r"\b(?:sd|stochastic_depth)(?:\.[A-Za-z_]\w*)+", text)
    names = {re.sub(r"^sd\.", "stochastic_depth.", each) for each in names}
    assert not [each for each in names if not resolves(each)]
    files = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|h|cpp|js|json))`", text))
    roots = (ROOT, ROOT / "src" / "stochastic_depth")
    ours = [each for each in files if any((root / each.split("/")[0]).is_dir() for root in roots)]
    assert not [each for each in ours if not any((root / each).exists() for root in roots)]


class Links(HTMLParser):
    """What a page links to, what it makes a browser fetch, and what can be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") != "canonical":
            self.fetched.append(given["href"])
        elif "src" in given:
            self.fetched.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Links]:
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {page: Links(page.read_text()) for page in folder.rglob("*.html")}


def test_every_page_is_in_the_site_and_in_its_navigation(site):
    root = next(page.parent for page in site if page.name == "404.html")
    start = {(root / urlsplit(link).path).resolve() for link in site[root / "index.html"].links}
    for name in PAGES:
        folder = root / name.removesuffix("index.md").removesuffix(".md")
        assert (folder / "index.html").is_file(), name
        assert folder.resolve() in start, f"{name} is not in the navigation"


def test_every_link_leads_somewhere(site):
    for page, here in site.items():
        if page.name == "404.html":
            continue
        for link in here.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page} links to {link}"
            if url.fragment and target in site:
                assert unquote(url.fragment) in site[target].anchors | {"__tabbed"}, (page, link)


def test_nothing_is_fetched_from_elsewhere(site):
    for page, here in site.items():
        assert here.fetched
        for link in here.fetched:
            assert not urlsplit(link).netloc, f"{page} fetches {link}"
        for style in re.findall(r"@import|url\(['\"]?https?:", page.read_text()):
            raise AssertionError(f"{page}: {style}")


def test_every_public_name_is_in_the_reference(site):
    anchors = set().union(*(links.anchors for page, links in site.items() if "api" in page.parts))
    missing = [name for name in sd.__all__ if f"stochastic_depth.{name}" not in anchors]
    assert not missing
