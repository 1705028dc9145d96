"""Models of transformers: side outputs, caches, and their own activation checkpointing."""

import pytest
import torch

import stochastic_depth as sd

transformers = pytest.importorskip("transformers", reason="needs transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_heads": 2}
IDS = torch.arange(24).view(2, 12) % 50
TEXT = {"input_ids": IDS, "use_cache": False}
EXAMPLES = {
    "gpt2": TEXT,
    "gptj": TEXT,
    "llama": TEXT,
    "bloom": TEXT,
    "falcon": TEXT,
    "bert": {"input_ids": IDS},
    "albert": {"input_ids": IDS},
    "t5": {**TEXT, "decoder_input_ids": IDS},
}


def build(name):
    torch.manual_seed(0)
    small = T5 if name == "t5" else {**SMALL, "rotary_dim": 4} if name == "gptj" else SMALL
    small = {**small, "n_layer": 4} if name == "bloom" else small
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **small))


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_block_is_found_and_verified(name):
    model, example = build(name), EXAMPLES[name]
    keys, expected = list(model.state_dict()), model.eval()(**example)[0]
    handle = sd.apply(model, sd.Uniform(1.0), example=example)
    assert len(handle.blocks) == {"t5": 6}.get(name, 4)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(**example)[0], expected)
    sd.remove(model)
    assert torch.equal(model(**example)[0], expected)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_training_steps_skip(name):
    model, closed = build(name), 0
    handle = sd.apply(model, sd.Uniform(0.5), example=EXAMPLES[name], skipped="freeze")
    parameters = dict(model.named_parameters())
    for _ in range(4):
        model.zero_grad()
        model.train()(**EXAMPLES[name])[0].sum().backward()
        for block, is_open in zip(handle.blocks, handle.gates.tolist(), strict=True):
            if not is_open:
                own = (p for p in block.parameters if "relative_attention" not in p)  # T5 shares it
                assert all(parameters[p].grad is None for p in own)
                closed += 1
    assert closed


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
@pytest.mark.parametrize("gate", ["sample", "subset"])
def test_each_sample_has_the_output_of_its_own_gates(name, gate):
    model = build(name).eval()
    handle = sd.apply(model, sd.Uniform(0.5), example=EXAMPLES[name], gate=gate)
    patterns = torch.rand(len(handle.blocks), 2, generator=torch.Generator().manual_seed(0)) < 0.5
    assert (patterns[:, 0] != patterns[:, 1]).any()
    with handle.forced(patterns):
        together = model(**EXAMPLES[name])[0]
    for sample, gates in enumerate(patterns.T):
        example = {
            key: value[sample : sample + 1] if isinstance(value, torch.Tensor) else value
            for key, value in EXAMPLES[name].items()
        }
        with handle.forced(gates):
            alone = model(**example)[0]
        torch.testing.assert_close(together[sample : sample + 1], alone)
    model.train()(**EXAMPLES[name])[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_librarys_own_checkpointing_recomputes_under_the_same_gates(use_reentrant):
    plain, model = build("llama"), build("llama")
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    depths = [sd.apply(m, sd.Uniform(0.5), example=TEXT, skipped="freeze") for m in (plain, model)]
    for _ in range(6):
        for m in (plain, model):
            m.zero_grad()
            m.train()(**TEXT)[0].square().sum().backward()
        assert torch.equal(depths[0].gates, depths[1].gates)
        for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            if "embed_tokens" in name and use_reentrant:
                continue  # its output is made a leaf, for reentrant checkpointing's sake
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_a_cache_in_training_is_refused_with_the_remedy():
    with pytest.raises(sd.errors.GateError, match="use_cache=False"):
        sd.apply(build("gpt2"), example={"input_ids": IDS})
    model = build("gpt2")
    sd.apply(model, example=TEXT)
    with pytest.raises(sd.errors.GateError, match="use_cache=False"):
        model.train()(IDS)
    model.config.use_cache = False
    model.train()(IDS)[0].sum().backward()
    model.config.use_cache = True
    assert model.eval()(IDS).past_key_values is not None


@pytest.mark.parametrize("gate", ["batch", "subset"])
def test_generating_in_training_mode_with_a_cache_is_refused_with_the_remedy(gate):
    config = transformers.GPT2Config(**SMALL, n_positions=32, bos_token_id=0, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config)
    handle = sd.apply(model, sd.Uniform(0.5), example=TEXT, gate=gate, scale="training")
    more = {"max_new_tokens": 6, "do_sample": False}
    with pytest.raises(sd.errors.GateError, match=r"to generate, call model\.eval\(\) first"):
        model.train().generate(IDS, **more)
    plain = model.train().generate(IDS, use_cache=False, **more)
    assert plain.shape == (2, 18)
    cached = model.eval().generate(IDS, **more)
    with handle.full_depth():  # every block runs, so the cache has all entries
        for module in model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        assert torch.equal(model.generate(IDS, **more), cached)


@pytest.mark.parametrize("remedy", ["call", "config"])
def test_the_remedies_against_a_cache_work_where_the_decoder_has_a_config_of_its_own(remedy):
    model = build("t5")
    example = {"input_ids": IDS, "decoder_input_ids": IDS}
    with pytest.raises(sd.errors.GateError, match=r"config of its own, as the decoder of T5"):
        sd.apply(model, example=example)
    model.config.use_cache = model.decoder.config.use_cache = remedy == "call"
    sd.apply(model, example=example | ({"use_cache": False} if remedy == "call" else {}))


def test_a_cache_of_a_subnetwork_is_refused_with_the_remedy():
    model = build("gpt2")
    handle = sd.apply(model, example=TEXT)
    with handle.subnetwork([True, False, True, True]):
        with pytest.raises(sd.errors.GateError, match="use_cache=False"):
            model.eval()(IDS)
        model(**TEXT)


def test_attention_weights_are_handed_on_where_they_are_computed():
    model = build("bert")
    model.set_attn_implementation("eager")
    sd.apply(model, sd.Uniform(0.5), example={"input_ids": IDS})
    assert len(model.eval()(IDS, output_attentions=True).attentions) == 4


def test_router_logits_of_blocks_that_run_are_refused_with_a_remedy_that_works(caplog):
    small = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 2, "use_cache": False}
    config = transformers.MixtralConfig(**small, output_router_logits=True)
    model = transformers.MixtralForCausalLM(config)
    example = {"input_ids": IDS, "labels": IDS}
    named = r"\d tensors, and its original \d: if it collects a value of each block.* turn that off"
    with pytest.raises(sd.errors.UnsupportedBlockError, match=named):
        sd.apply(model, example=example)
    assert not caplog.records
    model.config.output_router_logits = False
    assert len(sd.apply(model, example=example).blocks) == 4
