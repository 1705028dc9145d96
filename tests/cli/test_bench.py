import json
import statistics
import sys

import pytest

from stochastic_depth import __version__
from stochastic_depth.cli import main
from stochastic_depth.cli.bench import BENCHMARKS
from stochastic_depth.lab.bench.engines import DESIGNS
from stochastic_depth.lab.options import EngineOptions, StepOptions
from stochastic_depth.recipes.paper import gatings
from stochastic_depth.train import Config

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

SMALL = ["--batch", "4"]
ON_CPU = ["--device", "cpu", "--precision", "float32"]
OF_CIFAR_RESNETS = [*BENCHMARKS.keys() - {"depth"}]
CLOCKS = dict.fromkeys(BENCHMARKS, "process_time") | dict.fromkeys(
    ("distributed", "profile"), "perf_counter"
)
"""By which clock each times its steps on one thread of a CPU."""


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Run a benchmark at small size; gives what it printed and what it wrote."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments, repeats=3):
        out = tmp_path / "result.json"
        command = ["bench", *arguments, *SMALL, "--repeats", str(repeats), "--out", str(out)]
        if issubclass(BENCHMARKS[arguments[0]], StepOptions):
            command += ON_CPU
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 80
        flat = " ".join(printed.split())
        assert "1 thread; ours: cpu float32, engine" in flat
        result = json.loads(out.read_text())
        assert result["versions"].keys() == {"stochastic-depth", "torch", "python"}
        assert result["versions"]["stochastic-depth"] == __version__
        assert result["machine"]["threads"] == 1
        assert result["settings"]["repeats"] == repeats
        assert result["clock"] == CLOCKS[arguments[0]]
        assert (result["runtime"]["precision"], result["runtime"]["device"]) == (
            "float32",
            "cpu",
        )
        return printed, result

    return run


def test_overhead(bench):
    printed, result = bench("overhead", "--depth", "8", "--size", "16")
    assert "cost of the library" in printed
    assert "engine eager: autograd takes the steps" in " ".join(printed.split())
    assert (result["runtime"]["engine"], result["runtime"]["kernels"]) == (
        "eager",
        "reference",
    )
    assert all(len(seconds) == 3 for seconds in result["seconds"].values())


def test_only_what_an_engine_takes_has_the_option():
    with_engine = {name for name, kind in BENCHMARKS.items() if issubclass(kind, EngineOptions)}
    assert with_engine == {"skip", "peers", "depth", "profile"}
    assert [n for n, kind in BENCHMARKS.items() if not issubclass(kind, StepOptions)] == [
        "distributed"
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("peers --network vit-small --engine program", "autograd takes the steps of vit-small"),
        ("profile --engine compiled", "program"),
        ("overhead --engine program", "engine"),
        ("distributed --device cuda", "device"),
        ("peers --rate 1", "--rate is 1.0: a drop rate is at least 0 and below 1"),
        ("depth --deepest 20", "--deepest is 20: the first depth is 20"),
        ("depth --deepest 33", "--deepest is 33: it must be 6n + 2"),
        *(
            (f"{name} --depth 21", "--depth is 21: it must be 6n + 2")
            for name in sorted(OF_CIFAR_RESNETS)
        ),
        *((f"{name} --batch 1", "--batch ") for name in BENCHMARKS),
        *((f"{name} --repeats 1", "--repeats is 1") for name in BENCHMARKS),
        *((f"{name} --size 0", "--size is 0") for name in BENCHMARKS),
        ("gates --final 0", "--final is 0.0: it must be above 0 and at most 1"),
        ("gates --gatings loud", "there is no gating 'loud': choose among constant, batch"),
        ("gates --network gpt2", "--network is gpt2: give cifar-resnet, vit, timm/NAME or"),
        ("gates --network timm/resnet18 --depth 20", "--depth is not for timm/resnet18"),
        ("gates --network vit --depth 0", "--depth is 0"),
        ("distributed --ranks 1", "--ranks is 1"),
        ("distributed --ranks 3 --batch 32", "--ranks is 3 and --batch 32"),
    ],
)
def test_an_option_that_cannot_be_met_is_a_wrong_command_line(arguments, said, capsys):
    assert main(["bench", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert said in " ".join((shown.out + shown.err).split())


def test_gates(bench):
    printed, result = bench("gates", "--depth", "8", "--size", "8")
    assert result["runtime"]["engine"] == "eager"
    assert "engine eager: autograd takes the steps" in " ".join(printed.split())
    assert list(result["gatings"]) == list(gatings(Config()))
    assert set(result["gatings"]["constant"]["relative"].values()) == {1}


def test_skip(bench):
    printed, result = bench("skip", "--depth", "8", "--size", "16")
    assert "efficiency: time saved over FLOPs saved" in printed
    assert result["alternatives"]["constant depth"]["kept_for_backward"] == 1


def test_profile(bench):
    printed, result = bench("profile", "--depth", "8", "--size", "16", "--engine", "program")
    assert "aten::convolution_backward" in printed
    assert sum(result["operators"].values()) > 0
    pieces = result["pieces"]
    assert pieces["block of 16 channels, forward"]["count"] == 1
    assert pieces["transition to 32 channels, backward"]["count"] == 1
    assert 0 < pieces["rest"] < pieces["step"]


@pytest.mark.parametrize(
    ("network", "unit"), [("cifar-resnet", "images"), ("x-transformer", "tokens")]
)
def test_peers(network, unit, bench):
    if network == "x-transformer":
        pytest.importorskip("x_transformers", reason="needs x-transformers")
    printed, result = bench("peers", "--network", network, "--depth", "8", "--size", "16")
    assert f"{unit}/s" in printed
    by_autograd = "engine eager: there is no block program for this network"
    assert (by_autograd in " ".join(printed.split())) == (network == "x-transformer")
    assert result["seconds"].keys() == result["memory_bytes"].keys()
    for reason in result["missing"].values():
        assert reason.split()[0] in printed
    count = 4 if unit == "images" else 4 * 16
    seconds = result["seconds"]["constant depth"]
    per_second = count / statistics.median(seconds)
    assert result[f"{unit}_per_second"]["constant depth"] == pytest.approx(per_second)


def test_a_library_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["bench", "peers", "--network", "vit-small"]) == 1
    shown = capsys.readouterr().err
    assert "pip install timm" in shown
    assert shown.count("\n") == 1


def test_depth(bench, tmp_path):
    picture = tmp_path / "depth.png"
    printed, result = bench(
        "depth", "--deepest", "32", "--size", "16", "--plot", str(picture), repeats=2
    )
    assert "R²" in printed
    assert result["depths"] == [20, 32]
    assert result["lines"]["seconds"].keys() == {"constant", "stochastic"}
    assert result["lines"]["memory"]["constant"].keys() == {"slope", "intercept", "r_squared"}
    assert all(count > 0 for of_kind in result["bytes_per_image"].values() for count in of_kind)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_distributed(bench):
    printed, result = bench("distributed", "--depth", "8", "--size", "8", "--ranks", "2")
    assert "ResNet-8, 2 processes" in printed
    ways = result["ranks"]["2"]
    for way in ("DDP, skip_closed", "FSDP2, shard_branches"):
        constant, stochastic = ways[way]["constant depth"], ways[way]["p_L = 0.5"]
        assert stochastic["bytes"] / constant["bytes"] == pytest.approx(
            stochastic["open_share"], abs=0.02
        )
    assert ways["DDP"]["p_L = 0.5"]["bytes"] == ways["DDP"]["constant depth"]["bytes"]


def test_engines(bench, monkeypatch):
    monkeypatch.setenv("PATH", "")
    printed, result = bench("engines", "--depth", "8", "--size", "16")
    assert "program, PyTorch's kernels" in printed
    assert result["seconds"].keys() >= {"eager 100 %", "eager 50 %"}
    assert result["designs"]["eager"] == {"engine": "eager", "kernels": "reference"}
    assert {*result["designs"], *result["missing"]} == {*DESIGNS}
    for name, reason in result["missing"].items():
        assert name in printed
        assert reason
