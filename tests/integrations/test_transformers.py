"""The Trainer's callback: applied by the Trainer, resumed bit for bit, logged."""

import json

import pytest
import torch

import stochastic_depth as sd

hf = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")

from stochastic_depth.integrations.transformers import StochasticDepthCallback  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:::transformers|accelerate|torch"),
]
WORDS = torch.arange(64 * 16).view(64, 16) % 50
DATA = [{"input_ids": row, "labels": row} for row in WORDS]


class Gates(hf.TrainerCallback):
    """Notes the gates under which each micro-batch ran."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model, **_):
        self.seen.append(sd.handle_of(model).gates.tolist())

    on_substep_end = on_step_end


def gpt2(**options):
    hf.set_seed(0)
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=4, n_head=2, **options)
    )


def trainer(model, folder, *callbacks, **options):
    options = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, **options}
    arguments = hf.TrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, use_cpu=True, **options
    )
    return hf.Trainer(model, arguments, train_dataset=DATA, callbacks=list(callbacks))


@pytest.mark.parametrize("restore", [False, True])
def test_a_run_stopped_and_resumed_is_one_that_was_never_stopped(restore, tmp_path):
    seen, again = Gates(), Gates()
    straight, resumed = gpt2(), gpt2()
    trainer(straight, tmp_path, StochasticDepthCallback(sd.Uniform(0.5)), seen).train()
    trainer(
        resumed, tmp_path, StochasticDepthCallback(sd.Uniform(0.5)), again,
        restore_callback_states_from_checkpoint=restore,
    ).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # fmt: skip
    assert seen.seen[3:] == again.seen
    assert len({tuple(gates) for gates in seen.seen}) > 3
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("per", "different"), [("step", 3), ("pass", 6)])
def test_gates_are_drawn_for_a_step_of_the_optimizer_or_for_each_pass(per, different, tmp_path):
    seen = Gates()
    callback = StochasticDepthCallback(sd.Uniform(0.5), gates_per=per, seed=1)
    options = {"gradient_accumulation_steps": 2, "max_steps": 3}
    trainer(gpt2(), tmp_path, seen, callback, **options).train()
    at = callback.handle.gates_at
    assert seen.seen == [at(n // 2 if per == "step" else n).tolist() for n in range(6)]
    assert len({tuple(gates) for gates in seen.seen}) == different


def test_all_passes_of_a_step_share_gates(tmp_path):
    gates = []

    class TwoPasses(hf.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            losses = []
            for _ in range(2):
                losses.append(model(**inputs).loss)
                gates.append(sd.handle_of(model).gates.tolist())
            return sum(losses)

    callback = StochasticDepthCallback(sd.Uniform(0.5), seed=1)
    arguments = hf.TrainingArguments(
        str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, max_steps=3,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    model = gpt2()
    TwoPasses(model, arguments, train_dataset=DATA, callbacks=[callback]).train()
    assert gates == [callback.handle.gates_at(n // 4).tolist() for n in range(12)]
    model.train()(**{name: row[None] for name, row in DATA[0].items()})
    assert callback.handle.step == 4  # a loop of one's own draws a next step again


def test_the_best_checkpoint_is_evaluated_with_its_own_probabilities(tmp_path):
    def evaluated(**options):
        callback = StochasticDepthCallback(sd.Uniform(0.3), schedule=sd.Warmup(8))
        arguments = hf.TrainingArguments(
            str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, max_steps=8,
            **options,
        )  # fmt: skip
        made = hf.Trainer(
            gpt2(), arguments, train_dataset=DATA, eval_dataset=DATA, callbacks=[callback]
        )
        return made, callback

    saved = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "greater_is_better": True}
    best, callback = evaluated(load_best_model_at_end=True, **saved)
    best.train()
    step = best.state.best_global_step
    assert step == 2  # the highest loss counts as the best
    # Warmup lowers p from 1 to 0.3 in 8 steps; the last draw before a checkpoint is for step - 1.
    p = pytest.approx(1 - 0.7 * (step - 1) / 8)
    assert callback.handle.survival[0] == p
    assert best.evaluate()["eval_loss"] == best.state.best_metric

    fresh, callback = evaluated()
    fresh.model.load_state_dict(best.model.state_dict())
    assert fresh.evaluate()["eval_loss"] != pytest.approx(best.state.best_metric)
    callback.load_checkpoint(tmp_path / f"checkpoint-{step}")
    assert callback.handle.survival[0] == p
    assert fresh.evaluate()["eval_loss"] == best.state.best_metric


def test_a_folder_without_gates_is_refused(tmp_path):
    callback = StochasticDepthCallback()
    trainer(gpt2(), tmp_path, callback)
    with pytest.raises(sd.errors.CheckpointError, match=r"trainer_state\.json is missing"):
        callback.load_checkpoint(tmp_path)
    trainer(gpt2(), tmp_path, max_steps=3).train()
    with pytest.raises(sd.errors.CheckpointError, match="without StochasticDepthCallback"):
        callback.load_checkpoint(tmp_path / "checkpoint-3")


def test_resumption_goes_on_with_gates_for_each_pass(tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_steps": 6}
    seen, again = Gates(), Gates()
    per_pass = {"gates_per": "pass", "seed": 1}
    trainer(
        gpt2(), tmp_path, seen, StochasticDepthCallback(sd.Uniform(0.5), **per_pass), **options
    ).train()
    trainer(
        gpt2(), tmp_path, again, StochasticDepthCallback(sd.Uniform(0.5), **per_pass), **options
    ).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.seen == seen.seen[6:]


def test_the_logs_have_depths_and_drop_rate(tmp_path):
    seen = Gates()
    done = trainer(gpt2(), tmp_path, StochasticDepthCallback(sd.LinearDecay(0.5)), seen)
    done.train()
    logs = [log for log in done.state.log_history if "loss" in log]
    assert [log["stochastic_depth/realised_depth"] for log in logs] == [sum(g) for g in seen.seen]
    assert {log["stochastic_depth/expected_depth"] for log in logs} == {0.875 + 0.75 + 0.625 + 0.5}
    assert {log["stochastic_depth/drop_rate"] for log in logs} == {1 - 2.75 / 4}


def test_a_checkpoint_of_other_probabilities_is_refused(tmp_path):
    trainer(gpt2(), tmp_path, StochasticDepthCallback(sd.Uniform(0.5)), max_steps=3).train()
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert (
        saved["stateful_callbacks"]["StochasticDepthCallback"]["attributes"]["saved"]["step"] == 3
    )
    other = trainer(gpt2(), tmp_path, StochasticDepthCallback(sd.Uniform(0.8)))
    with pytest.raises(sd.errors.StateError, match=r"survival=\[0.5"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_model_with_a_cache_and_one_that_is_applied_already_are_taken(tmp_path):
    model = gpt2(use_cache=True)
    callback = StochasticDepthCallback(sd.Uniform(0.5))
    trainer(model, tmp_path, callback, max_steps=1).train()
    assert not model.config.use_cache
    assert callback.handle is sd.handle_of(model)
    second = StochasticDepthCallback()
    trainer(model, tmp_path, second, max_steps=1).train()
    assert second.handle is callback.handle
    with pytest.raises(sd.errors.ApplyError, match=r"has stochastic depth already: sd\.remove"):
        trainer(model, tmp_path, StochasticDepthCallback(sd.Uniform(0.9)))


def test_a_decoder_with_a_cache_and_a_config_of_its_own_is_trained(tmp_path):
    small = {"num_layers": 2, "num_heads": 2, "d_model": 16, "d_kv": 8, "d_ff": 32}
    config = hf.T5Config(vocab_size=50, decoder_start_token_id=0, **small)
    model = hf.T5ForConditionalGeneration(config)
    assert model.decoder.config.use_cache
    callback = StochasticDepthCallback(sd.Uniform(0.5))
    trainer(model, tmp_path, callback, max_steps=1).train()
    assert callback.handle.step == 1
    assert not model.decoder.config.use_cache


def test_a_model_made_anew_by_model_init_is_applied_to(tmp_path):
    seen = Gates()
    callback = StochasticDepthCallback(sd.Uniform(0.5), gates_per="pass")
    arguments = hf.TrainingArguments(
        str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, max_steps=1
    )
    made = hf.Trainer(
        args=arguments, model_init=lambda: gpt2(), train_dataset=DATA, callbacks=[callback, seen]
    )  # fmt: skip
    first = callback.handle
    made.train()
    assert callback.handle is sd.handle_of(made.model)
    assert callback.handle is not first
    made.train()  # another trial begins where the first one did
    assert seen.seen[1] == seen.seen[0] == callback.handle.gates_at(0).tolist()
    assert callback.handle.step == 1


def test_a_callback_follows_one_handle(tmp_path):
    model = gpt2()
    for layer in model.transformer.h[:2]:
        layer.mlp = torch.nn.Sequential(sd.Residual(layer.mlp))
        sd.apply(layer.mlp)
    with pytest.raises(sd.errors.ApplyError, match=r"modules \('transformer.h.0.mlp', .*stacks="):
        trainer(model, tmp_path, StochasticDepthCallback())
