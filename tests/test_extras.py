"""What is missing is an error with the command that installs it."""

import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from stochastic_depth import extras
from stochastic_depth.errors import MissingExtraError
from support.processes import environment

ROOT = Path(__file__).parents[1]


class Installed:
    """The metadata of an installed distribution."""

    def __init__(self, url):
        self.url = url

    def read_text(self, name):
        return self.url and json.dumps({"url": self.url, "dir_info": {}})


def elsewhere(monkeypatch, tmp_path, url):
    """As if the library lay in site-packages, installed from `url`."""
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site-packages" / "sd" / "extras.py"))
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(url))


def test_from_a_checkout_the_command_installs_the_checkout():
    with pytest.raises(MissingExtraError, match=r"not_there cannot be imported .*: pip install "):
        extras.require("not_there", "data")
    assert extras.installing("report", "altair") == f"pip install '{ROOT}[report]'"


def test_from_a_wheel_the_command_installs_the_wheel(monkeypatch, tmp_path):
    wheel = tmp_path / "my wheels" / "stochastic_depth-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    elsewhere(monkeypatch, tmp_path, wheel.as_uri())
    wanted = ["pip", "install", f"{wheel}[report]"]
    assert shlex.split(extras.installing("report", "altair")) == wanted


@pytest.mark.parametrize("url", [None, "file:///nowhere/sd.whl", "https://example.org/sd.whl"])
def test_where_the_source_is_gone_the_packages_are_named_and_never_the_library(
    monkeypatch, tmp_path, url
):
    elsewhere(monkeypatch, tmp_path, url)
    needed = [
        "altair>=5.5; extra == 'report'",
        'jinja2>=3.1; extra == "report"',
        "rich; extra == 'train'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2", *needed])
    assert extras.installing("report", "altair") == "pip install 'altair>=5.5' 'jinja2>=3.1'"
    monkeypatch.setattr(metadata, "requires", lambda name: None)
    assert extras.installing("data", "numpy.linalg") == "pip install numpy"


def test_nothing_that_people_read_gives_the_library_s_name_to_pip():
    shown = re.compile(r"pip install [^\n`]*(?<![./\w-])stochastic-depth\b")
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.py")]:
        assert not shown.search(path.read_text()), path


def test_what_installs_torchvision_keeps_the_installed_pytorch(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: {"torch": "2.13.0+cpu"}[name])
    assert extras.installing("data", "PIL") == f"pip install '{ROOT}[data]' torch==2.13.0"


TORCHVISION_WITHOUT_OPERATORS = """
import sys
import torch
assert "torchvision" not in sys.modules
from stochastic_depth.extras import require
size = require("torchvision.transforms.v2", "data").Resize(4)(torch.ones(3, 8, 8)).shape
assert size == (3, 4, 4), size
"""


def test_torchvision_of_another_build_is_imported_without_its_operators():
    pytest.importorskip("torchvision", reason="needs torchvision")
    command = [sys.executable, "-c", TORCHVISION_WITHOUT_OPERATORS]
    subprocess.run(command, check=True, env=environment())
