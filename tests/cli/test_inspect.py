import json
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from stochastic_depth.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.f(x)


class UsesItTwice(Block):
    def forward(self, x):
        y = self.f(x)
        return x + y + 0 * torch.cat([y, y], -1)[..., :8]


class Modulates(Block):
    """Two additions that share most of their branches."""

    def forward(self, x):
        a, b = x.chunk(2, -1)
        m, n = torch.tanh(self.f(x)).chunk(2, -1)
        return torch.cat([a + m * n, b + n], -1)


def modulated():
    return nn.Sequential(Modulates(), Modulates()), torch.randn(2, 8)


def mine():
    return nn.Sequential(*(Block() for _ in range(4)))


def refused():
    return nn.Sequential(Block(), UsesItTwice()), torch.randn(2, 8)


def test_a_model_is_planned_verified_and_timed(capsys, tmp_path):
    out = tmp_path / "inspected.json"
    command = ["inspect", f"{__name__}:mine", "--shape", "8", "--repeats", "2", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Block" in printed
    assert "4 blocks verified in 5 sets" in printed
    assert "expected depth 2.75 of 4 blocks" in printed
    assert all(len(line) <= 80 for line in printed.splitlines())
    result = json.loads(out.read_text())
    assert [block["survival"] for block in result["blocks"]] == [0.875, 0.75, 0.625, 0.5]
    assert result["verification"]["blocks"] == 4


def test_the_plan_alone_needs_no_storage(capsys):
    pytest.importorskip("torchvision", reason="needs torchvision")
    assert main(["inspect", "torchvision/vit_l_16", "--plan-only", "--survival", "uniform"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("EncoderBlock") == 24
    assert "verified" not in printed


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_language_model_is_planned_by_its_type_or_from_a_file(
    kind, tmp_path, capsys, monkeypatch
):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    assert main(["inspect", f"transformers/{kind}", "--plan-only"]) == 0
    by_type = capsys.readouterr().out
    blocks = transformers.AutoConfig.for_model(kind).num_hidden_layers
    assert by_type.count("slice") == blocks
    (tmp_path / f"my_{kind}.py").write_text(
        "import torch, transformers\n"
        "def make():\n"
        f"    config = transformers.AutoConfig.for_model({kind!r}, use_cache=False)\n"
        "    return transformers.AutoModel.from_config(config), torch.ones(2, 16).long()\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", f"my_{kind}:make", "--plan-only"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == by_type.splitlines()[1:]


def test_what_cannot_be_skipped_is_an_error_that_names_the_remedy(capsys):
    assert main(["inspect", f"{__name__}:refused"]) == 1
    printed = capsys.readouterr()
    assert "'1' (UsesItTwice)" in printed.err
    assert "--exclude 1 leaves" in printed.err
    assert main(["inspect", f"{__name__}:refused", "--exclude", "1", "--repeats", "2"]) == 0


def test_one_coin_for_each_block_is_advised_where_it_works(capsys):
    command = ["inspect", f"{__name__}:modulated", "--repeats", "2", "--granularity"]
    assert main([*command, "unit"]) == 1
    assert "; --granularity block skips all additions of a block" in capsys.readouterr().err
    assert main([*command, "block"]) == 0


def test_no_such_model(capsys):
    assert main(["inspect", "resnet50"]) == 1
    assert "timm/NAME" in capsys.readouterr().err


def test_a_factory_of_the_current_folder_is_found_and_its_page_is_written(tmp_path):
    (tmp_path / "mine_alone.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Block(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.f = nn.Linear(8, 8)\n\n"
        "    def forward(self, x):\n"
        "        return x + self.f(x)\n\n"
        "def make():\n"
        "    return nn.Sequential(*(Block() for _ in range(4))), torch.randn(2, 8)\n"
    )
    command = "import sys; sys.path.remove(''); from stochastic_depth.cli import main; main()"
    arguments = ["inspect", "mine_alone:make", "--repeats", "2", "--report", "page.html"]
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr == ""
    page = (tmp_path / "page.html").read_text()
    assert "Skippable blocks" in page
    assert "sd.apply(model, sd.LinearDecay(0.5), example=inputs)" in page
    assert len(re.findall(r'<figure id="([^"]+)">', page)) == 2
    # a cell for each block and step, in two widths
    assert page.count('aria-label="step ') == 2 * 4 * 24
    assert "drop rate of the last block" in page
    assert "NaN" not in page


@dataclass
class Answer:
    """An output whose tensors PyTorch does not find, because it is no registered container."""

    logits: torch.Tensor


class Answers(nn.Sequential):
    def forward(self, x):
        return Answer(super().forward(x))


def answers():
    return Answers(*(Block() for _ in range(4))), torch.randn(2, 8)


def test_the_page_of_a_model_that_returns_a_dataclass_is_written(tmp_path):
    page = tmp_path / "page.html"
    command = ["inspect", f"{__name__}:answers", "--repeats", "2", "--report", str(page)]
    assert main(command) == 0
    assert "Skippable blocks" in page.read_text()


MISTAKES = {
    "def make(:": ("SyntaxError: invalid syntax", 1),
    "import torch, nowhere": ("ModuleNotFoundError: No module named 'nowhere'", 1),
    "\nfrom torch import nothing": ("ImportError: cannot import name 'nothing'", 2),
    "undefined": ("NameError: name 'undefined' is not defined", 1),
    "import torch\ndef make():\n    return torch.zeros(2) @ torch.zeros(3)": ("RuntimeError", 3),
}


@pytest.mark.parametrize("extra", [[], ["--plan-only"]], ids=["whole", "plan"])
@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_mistake_in_the_module_of_a_factory_is_shown_with_its_place(
    number, extra, tmp_path, capsys, monkeypatch
):
    text, (shown, line) = list(MISTAKES.items())[number]
    file = tmp_path / f"mistake_{number}_{len(extra)}.py"
    file.write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", f"{file.stem}:make", *extra]) == 1
    error = capsys.readouterr().err
    assert f"{file.stem}:make cannot be built ({shown}" in error
    assert f"in {file}, line {line}: correct it there" in error
    assert "--shape" not in error


@pytest.mark.parametrize("extra", [[], ["--plan-only"]])
def test_a_shape_that_the_model_does_not_take_is_one_line(extra, capsys):
    assert main(["inspect", f"{__name__}:mine", "--shape", "5", *extra]) == 1
    shown = capsys.readouterr().err
    assert "mine does not run on the example (RuntimeError: " in shown
    assert shown.count("\n") == 1
