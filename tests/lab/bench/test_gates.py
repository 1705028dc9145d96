import sys
from functools import partial

import pytest
from rich.console import Console

from stochastic_depth.errors import ConfigError, MissingExtraError
from stochastic_depth.lab.bench.costs import step_costs
from stochastic_depth.lab.bench.gates import gating_steps
from stochastic_depth.lab.options import GatesOptions
from stochastic_depth.train.runtime import Runtime

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]
CPU = Runtime("cpu", "float32", 1)
SMALL = {
    "timm/vit_small_patch16_224": {"depth": 4, "embed_dim": 64, "num_heads": 2},
    "transformers/gpt2": {"n_layer": 4, "n_embd": 64, "n_head": 2, "vocab_size": 100},
}
LAYERS = {
    "timm/vit_small_patch16_224": ("qkv", "proj", "fc1", "fc2"),
    "transformers/gpt2": ("c_attn", "c_proj", "c_fc"),
}


def costs(steps, **options):
    asked = GatesOptions(**{"batch": 4, "size": 32, "repeats": steps, **options})
    asked.check()
    build = partial(gating_steps, asked, CPU, **SMALL.get(asked.network, {}))
    return step_costs(build, steps, CPU, Console(quiet=True))


@pytest.mark.parametrize("network", ["cifar-resnet", "vit"])
def test_balanced_gates_keep_the_same_in_every_step(network):
    depth = {"cifar-resnet": 32, "vit": None}[network]
    gatings = ("batch", "balanced-batch", "sample")
    found = costs(12, network=network, depth=depth, gatings=gatings, size=8, final=0.3)
    assert list(found) == ["constant", *gatings]
    constant, batch, balanced, sample = found.values()
    assert balanced.peak_kept / balanced.kept < batch.peak_kept / batch.kept
    assert balanced.peak_kept < constant.peak_kept
    assert balanced.flops == pytest.approx(batch.flops, rel=0.2)
    assert batch.flops < constant.flops == sample.flops


def test_a_schedule_is_passed_through():
    early = costs(6, depth=20, gatings=("batch", "early"), size=8)
    assert early["batch"].flops < early["early"].flops < early["constant"].flops


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("network", SMALL)
def test_forward_only_saves_the_bytes_of_skipped_blocks_but_not_their_forward_pass(network, lora):
    pytest.importorskip(network.partition("/")[0])
    if lora:
        pytest.importorskip("peft", reason="needs peft")
    chosen = {"gatings": ("batch", "forward-only"), "lora": LAYERS[network] if lora else ()}
    whole, skipped, forward_only = costs(4, network=network, final=0.1, **chosen).values()
    assert skipped.flops < forward_only.flops < whole.flops
    assert forward_only.kept == pytest.approx(skipped.kept, rel=0.1)
    assert forward_only.kept < whole.kept


def test_subset_gates_of_a_language_model_save_the_flops_of_other_texts():
    pytest.importorskip("transformers")
    found = costs(3, network="transformers/gpt2", gatings=("subset", "balanced-subset"))
    assert found["balanced-subset"].flops < found["constant"].flops
    assert found["subset"].flops < found["constant"].flops


def test_without_peft_there_are_no_adapters(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match="pip install peft"):
        costs(2, depth=8, lora=("conv1",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"network": "timm/vit_smol"}, "timm has no model 'vit_smol'"),
        ({"network": "transformers/gtp2"}, "transformers/gtp2, of which there is no language"),
        ({"network": "transformers/t5"}, "transformers/t5, of which there is no language model"),
        ({"depth": 8, "lora": ("qkv",)}, "--lora is qkv: "),
    ],
)
def test_what_is_not_there_is_named(options, said):
    for package in ("timm", "transformers", "peft"):
        pytest.importorskip(package)
    with pytest.raises(ConfigError, match=said):
        costs(2, **options)
