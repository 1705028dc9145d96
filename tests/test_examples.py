"""Every file of examples/ runs, and prints what its page in the docs shows."""

import re
import runpy
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
NEEDS = {
    "accelerate_loop": "accelerate",
    "detection_ultralytics": "ultralytics",
    "diffusion": "diffusers",
    "graphs": "torch_geometric",
    "huggingface_trainer": "transformers",
    "language_model": "transformers",
    "lightning_trainer": "lightning",
    "lora": "peft",
    "speech": "transformers",
    "tensorboard_logging": "tensorboard",
    "timm_models": "timm",
    "torchvision_reference": "torchvision",
}
pytestmark = pytest.mark.usefixtures("one_thread")


def form(text: str) -> list[str]:
    """The lines of `text`, with the same for all numbers, and for all rows of gates.

    The time saved in a few steps is a negative number where another program has taken it.
    """
    text = re.sub(r"[#.]{3,}", "#", re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "0", text))
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_its_page_shows(name, capsys, monkeypatch, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"needs {NEEDS[name]}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries' deprecations are not ours to fix
        runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
    printed = form(capsys.readouterr().out)
    shown = form((ROOT / "examples" / "output" / f"{name}.txt").read_text())
    assert shown
    missing = [line for line in shown if line not in printed]
    assert not missing, printed


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_fits_a_screen_and_has_a_page(name):
    assert len(EXAMPLES[name].read_text().splitlines()) <= 40
    pages = [page.read_text() for page in (ROOT / "docs" / "integrations").glob("*.md")]
    for part in (f"examples/{name}.py", f"examples/output/{name}.txt"):
        assert sum(part in page for page in pages) == 1, part


def test_every_output_belongs_to_an_example():
    outputs = {path.stem for path in (ROOT / "examples" / "output").glob("*.txt")}
    assert outputs == set(EXAMPLES)
