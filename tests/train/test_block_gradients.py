"""What the journal tells of each block: gradients where it was open, and how many were active."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from stochastic_depth.draw import draw
from stochastic_depth.train import ModelConfig, OptimizerConfig, SurvivalConfig, begin, fit
from stochastic_depth.train.train_state import TrainState
from support.runs import interrupted_and_resumed, without_clock

pytestmark = pytest.mark.usefixtures("one_thread")
ENGINES = ["eager", "program"]
BLOCKS = 6


def by_autograd(config, run, images, sampled):
    """Of every sampled step the mean absolute gradients, nan where a block was closed.

    From the weights the training has before the step: one more forward and backward pass of them.
    """
    train_state = TrainState(config, run.runtime, images)
    rows = {}
    for step, (pixels, labels) in enumerate(stream(images, config.epochs)):
        if step in sampled:
            twin = TrainState(config, run.runtime, images)
            state = train_state.state_dict()
            twin.load_state_dict({**json_free(state), "step": train_state.step})
            F.cross_entropy(twin.model(pixels), labels).backward()
            gates = twin.gates.tolist()
            gradients = [unit.branch[0].weight.grad for unit in twin.model.blocks]
            rows[step] = [
                gradient.double().abs().mean().item() if is_open else math.nan
                for gradient, is_open in zip(gradients, gates, strict=True)
            ]
        train_state.advance(pixels, labels)
    return rows


def json_free(state):
    """A copy that shares nothing."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {k: json_free(v) for k, v in state.items()}
    return [json_free(v) for v in state] if isinstance(state, list) else state


def stream(images, epochs):
    for epoch in range(epochs):
        yield from images.train(epoch)


@pytest.mark.parametrize("skipped", ["paper", "freeze"])
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_means_over_the_sampled_steps_in_which_a_block_was_open(
    engine, skipped, small, path, silent
):
    survival = SurvivalConfig(final=0.3, skipped=skipped)
    config = replace(small, engine=engine, survival=survival, evaluate_every=10)
    run, images = begin(config, path)
    records = list(fit(run, images, silent))
    rows = by_autograd(config, run, images, sampled=range(0, 20, 2))
    for record, first in zip(records, (0, 10), strict=True):
        of_interval = [rows[step] for step in range(first, first + 10, 2)]
        for block, mean in enumerate(record.block_gradients):
            values = [row[block] for row in of_interval if not math.isnan(row[block])]
            if mean is None:
                assert not values
            else:
                assert mean == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert any(None not in record.block_gradients for record in records)


@pytest.mark.parametrize("engine", ENGINES)
def test_active_blocks_are_counted_as_they_were_drawn(engine, small, path, silent):
    run, images = begin(replace(small, engine=engine), path)
    records = list(fit(run, images, silent))
    survival = tuple(1 - block / BLOCKS * 0.7 for block in range(1, BLOCKS + 1))
    for record in records:
        steps = range(record.step - 4, record.step)
        drawn = Counter(int(draw(small.seed, step, survival).sum()) for step in steps)
        assert record.active_counts == {str(n): count for n, count in sorted(drawn.items())}


def test_with_gates_for_single_samples_samples_are_counted(small, path, silent):
    config = replace(small, survival=SurvivalConfig(final=0.3, gate="sample"))
    run, images = begin(config, path)
    record = next(fit(run, images, silent))
    survival = tuple(1 - block / BLOCKS * 0.7 for block in range(1, BLOCKS + 1))
    drawn = Counter(
        active for step in range(4) for active in draw(0, step, survival, 32).sum(0).tolist()
    )
    assert record.active_counts == {str(n): count for n, count in sorted(drawn.items())}
    assert None not in record.block_gradients


def test_constant_depth_has_a_gradient_for_each_block_and_all_of_them_active(small, path, silent):
    run, images = begin(replace(small, survival=SurvivalConfig(rule="constant")), path)
    record = next(fit(run, images, silent))
    assert record.active_counts == {str(BLOCKS): 4}
    assert len(record.block_gradients) == BLOCKS
    assert None not in record.block_gradients


def test_a_network_without_blocks_has_none(small, path, silent):
    model = ModelConfig(kind="densenet", depth=10, growth=4)
    config = replace(small, model=model, survival=SurvivalConfig(rule="constant"))
    record = next(fit(*begin(config, path), silent))
    assert record.block_gradients == []
    assert record.active_counts == {"0": 4}


def test_long_intervals_sample_every_tenth_step(small, path):
    config = replace(small, optimizer=OptimizerConfig(batch=2), evaluate_every=300)
    run, images = begin(config, path)
    train_state = TrainState(config, run.runtime, images)
    for _, (pixels, labels) in zip(range(21), images.train(0), strict=False):
        train_state.advance(pixels, labels)
    assert len(train_state.metrics.block_gradients) == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_stopped_within_an_interval_tells_the_same(engine, small, path, silent, tmp_path):
    config = replace(small, engine=engine, evaluate_every=10)
    run, images = begin(config, path)
    whole = list(fit(run, images, silent))
    other = interrupted_and_resumed(tmp_path / "other", config, stops=[3, 7, 15])
    assert without_clock(other.records()) == without_clock(whole)


def test_a_gradient_that_is_not_finite_is_no_record(small, path, silent):
    run, images = begin(small, path)
    record = next(fit(run, images, silent))
    assert record.is_finite
    assert replace(record, block_gradients=[None, 1.0]).is_finite
    assert not replace(record, block_gradients=[None, math.inf]).is_finite
    assert not replace(record, train_loss=math.nan).is_finite
