"""What is missing is an error with the command that installs it."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from stochastic_depth import extras
from stochastic_depth.errors import MissingExtraError
from support.processes import environment

ROOT = Path(__file__).parents[1]


NEEDED = [
    "torch>=2.6",
    "altair>=5.5; extra == 'report'",
    'jinja2>=3.1; extra == "report"',
    "rich; extra == 'train'",
    "pillow>=11; extra == 'data'",
]


def test_the_packages_of_an_extra_are_named_and_never_the_library(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: NEEDED)
    assert extras.installing("report", "altair") == "pip install 'altair>=5.5' 'jinja2>=3.1'"
    with pytest.raises(MissingExtraError, match=r"not_there cannot be imp.*: pip install 'altair"):
        extras.require("not_there", "report")


def test_without_metadata_or_an_extra_the_package_of_the_module_is_named(monkeypatch):
    with pytest.raises(
        MissingExtraError, match=r"not_there.layers cannot .*: pip install not_there$"
    ):
        extras.require("not_there.layers")
    monkeypatch.setattr(metadata, "requires", lambda name: None)
    assert extras.installing("data", "numpy.linalg") == "pip install numpy"


def test_a_library_for_another_pytorch_is_not_said_to_be_missing(monkeypatch, tmp_path):
    (tmp_path / "compiled.py").write_text("raise RuntimeError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match=r"undefined symbol.*from the same index$"):
        extras.require("compiled")


def test_nothing_that_people_read_gives_the_library_s_name_to_pip():
    shown = re.compile(r"pip install [^\n`]*(?<![./\w-])stochastic-depth\b")
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.py")]:
        assert not shown.search(path.read_text()), path


def test_what_installs_torchvision_keeps_the_installed_pytorch(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: NEEDED)
    monkeypatch.setattr(metadata, "version", lambda name: {"torch": "2.13.0+cpu"}[name])
    assert extras.installing("data", "PIL") == "pip install 'pillow>=11' torch==2.13.0"


def test_there_is_a_torchvision_for_the_oldest_pytorch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = project["dependencies"]
    *_, torchvision = project["optional-dependencies"]["data"]
    assert torch.startswith("torch>=2.")
    # Each version 0.n needs PyTorch 2.(n - 15), and no other.
    assert torchvision == f"torchvision>=0.{int(torch.partition('.')[2]) + 15}"


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
