"""What mkdocs does besides: files of the repository as pages, and the results they point to.

The pages of docs/ can be read as they stand. In the site, a page that is only a link to a file has
that file's text, with its links put right; and a sentence that links an example and what it prints
becomes the program and its output.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"EXPERIMENTS.md": "results.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
"""Where a file at the root of the repository is found in the site."""
EXAMPLE = re.compile(
    r"^\[(?P<program>examples/\S+)\]\(\S+\) prints\s"
    r"\[this\]\(\S*(?P<output>examples/output/\S+)\)(?P<how>[^.]*)\.$",
    re.MULTILINE,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The figures and records of results/ are part of the site."""
    for path in sorted((ROOT / "results").rglob("*")):
        if path.is_file():
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in whole files, then turn links that leave docs/ into what the site has for them."""
    whole = re.fullmatch(r"\s*\[(\S+)\]\(\S+\)\s*", markdown)
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    if whole:
        markdown, folder = (ROOT / whole[1]).read_text(), posixpath.dirname(whole[1])

    def put_right(link: re.Match[str]) -> str:
        text, target = link.groups()
        if re.match(r"[a-z]+:|#", target):
            return link[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        path = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(path) is None:
            return link[0] if folder.startswith("docs") else text
        path = posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or ".")
        return f"[{text}]({path}{'#' + anchor if anchor else ''})"

    # The programs come last, so that nothing in them is taken for a link.
    return EXAMPLE.sub(_program, re.sub(r"\[([^\]\n]*)\]\(([^)\s]+)\)", put_right, markdown))


def _program(example: re.Match[str]) -> str:
    program, output = ((ROOT / example[each]).read_text() for each in ("program", "output"))
    return (
        f'``` {{.py title="{example["program"]}"}}\n{program}```\n\n'
        f"It prints{example['how']}:\n\n```text\n{output}```"
    )
