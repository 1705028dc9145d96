import math
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import torch

import stochastic_depth as sd
from stochastic_depth.draw import draw
from stochastic_depth.errors import CheckpointError, ConfigError, DivergedError, RunError
from stochastic_depth.models.networks import NETWORKS
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SurvivalConfig,
    begin,
    checkpoint,
    fit,
    journal,
    open_run,
    reopen,
    trained_model,
)
from stochastic_depth.train.build import handle_or_always_open
from stochastic_depth.train.run_folder import FORMAT
from stochastic_depth.train.schedule_config import ScheduleConfig
from stochastic_depth.train.step import evaluate
from stochastic_depth.train.train_state import TrainState
from stochastic_depth.train.weights import write_weights
from support.data_sets import write_pictures
from support.runs import (
    assert_same_end,
    edit_description,
    end_state,
    finish,
    interrupted_and_resumed,
)


def test_a_run_writes_its_folder(small, path, silent):
    run, records = finish(path, small, silent)
    assert sorted(p.name for p in path.iterdir() if p.name != "lock") == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
    ]
    assert open_run(path) == run
    assert run.records() == records
    assert [r.step for r in records] == [4, 8, 12, 16, 20]
    assert records[-1].epoch == 2


def test_losses_and_errors_are_the_golden_ones(small, path, silent):
    config = replace(RECIPES["digits"](), model=small.model, survival=SurvivalConfig(final=0.8))
    config = replace(config, epochs=8, evaluate_every=10)
    _, records = finish(path, config, silent)
    losses = [2.3018, 2.2793, 2.2036, 1.899, 1.3408, 1.2006, 1.0022, 1.1768]
    errors = [89.0, 73.6, 65.2, 29.6, 18.0, 11.0, 8.6, 7.6]
    assert [r.train_loss for r in records] == pytest.approx(losses, abs=2e-3)
    assert [r.test_error for r in records] == pytest.approx(errors, abs=1)


def test_a_journal_is_not_read_again_for_every_record(small, path, silent, monkeypatch):
    """Its parsed records would cost more with each interval of a long run."""
    run, images = begin(small, path)
    records = [next(going_on := fit(run, images, silent))]
    monkeypatch.setattr(journal, "_record", lambda _: pytest.fail("read again"))
    records += going_on
    monkeypatch.undo()
    assert run.records() == records


def test_blocks_are_counted_as_they_were_drawn(small, path, silent):
    _, records = finish(path, small, silent)
    survival = tuple(sd.LinearDecay(0.3)(block, 6) for block in range(1, 7))
    drawn = [draw(small.seed, step, survival).sum().item() for step in range(20)]
    assert [r.active_blocks for r in records] == [
        sum(drawn[i : i + 4]) / 4 for i in range(0, 20, 4)
    ]
    assert [r.expected_active_blocks for r in records] == pytest.approx([sum(survival)] * 5)


def test_constant_depth_runs_every_block(small, path, silent):
    run, records = finish(path, replace(small, survival=SurvivalConfig(rule="constant")), silent)
    assert {r.active_blocks for r in records} == {6.0}
    assert end_state(run)[1] is None


def test_a_network_without_blocks_trains_at_constant_depth(small, path, silent):
    model = ModelConfig(kind="densenet", depth=10, growth=4)
    config = replace(small, model=model, survival=SurvivalConfig(rule="constant"))
    _, records = finish(path, config, silent)
    assert {r.active_blocks for r in records} == {0.0}
    assert records[-1].train_loss < records[0].train_loss


DEPTHS = {"cifar-resnet": 8, "imagenet-resnet": 50, "densenet": 10, "vit": 1}


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_takes_a_step_on_images_of_one_channel(small, path, kind):
    rule = "constant" if kind == "densenet" else "linear"
    model = ModelConfig(kind=kind, depth=DEPTHS[kind])
    config = replace(small, model=model, survival=SurvivalConfig(rule=rule), engine="eager")
    run, images = begin(config, path)
    assert images.shape == (1, 8, 8)
    measured = TrainState(config, run.runtime, images).advance(*next(images.train(0)))
    assert measured.loss.isfinite()


@pytest.mark.parametrize("gate", ["sample", "subset"])
def test_gates_for_single_samples_train_and_resume(small, path, silent, gate, tmp_path):
    config = replace(small, survival=SurvivalConfig(final=0.3, gate=gate))
    run, records = finish(path, config, silent)
    assert 0 < records[0].active_blocks < 6
    other = interrupted_and_resumed(tmp_path / "other", config, stops=[3, 9])
    assert_same_end(run, other)


@pytest.mark.parametrize("stops", [[1], [4], [10], [2, 3, 19], [20]])
def test_a_run_stopped_anywhere_ends_where_it_would_have(small, path, silent, stops, tmp_path):
    run, _ = finish(path, small, silent)
    other = interrupted_and_resumed(tmp_path / "other", small, stops)
    assert_same_end(run, other)


def test_a_schedule_is_resumed_where_it_was(small, path, silent, tmp_path):
    config = replace(
        small, survival=SurvivalConfig(final=0.3, schedule=ScheduleConfig("warmup", until=0.5))
    )
    run, records = finish(path, config, silent)
    assert records[0].expected_active_blocks > records[-1].expected_active_blocks
    assert_same_end(run, interrupted_and_resumed(tmp_path / "other", config, [7]))


def test_the_same_run_twice_is_the_same(small, path, silent, tmp_path):
    run, _ = finish(path, small, silent)
    other, _ = finish(tmp_path / "other", small, silent)
    assert_same_end(run, other)


def test_another_seed_is_another_run(small, path, silent, tmp_path):
    _, records = finish(path, small, silent)
    _, others = finish(tmp_path / "other", replace(small, seed=1), silent)
    assert records[0].train_loss != others[0].train_loss


def test_the_global_random_state_plays_no_part_and_is_left_alone(small, path, silent, tmp_path):
    run, _ = finish(path, small, silent)
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    other, _ = finish(tmp_path / "other", small, silent)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_end(run, other)


def test_going_on_with_other_threads_is_told(small, path, silent):
    run, images = begin(small, path)
    records = fit(run, images, silent)
    next(records)
    records.close()
    threads = run.runtime.threads + 1
    edit_description(path, lambda described: described["runtime"].update(threads=threads))
    next(fit(*reopen(path), silent))
    assert f"begun with {threads} threads" in silent.said[0]


def test_a_finished_run_is_left_as_it_is(small, path, silent):
    finish(path, small, silent)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert list(fit(*reopen(path), silent)) == []
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_checkpoint(small, path, silent):
    config = replace(small, optimizer=OptimizerConfig(learning_rate=1e30))
    run, images = begin(config, path)
    with pytest.raises(DivergedError, match=r"not finite at step \d+ .*no good checkpoint"):
        list(fit(run, images, silent))
    assert run.checkpoints.steps() == []


def test_the_last_good_checkpoint_is_named_when_weights_diverge(small, path, silent, monkeypatch):
    run, images = begin(small, path)
    records = fit(run, images, silent)
    next(records)
    normal = images.train

    def poisoned(epoch, start=0):
        for pixels, labels in normal(epoch, start):
            yield pixels * math.nan, labels

    records.close()
    monkeypatch.setattr(images, "train", poisoned)
    with pytest.raises(DivergedError, match=r"step 4 .*step-000000004\.ckpt"):
        list(fit(run, images, silent))
    assert run.checkpoints.steps() == [4]


def test_other_data_than_the_run_began_on_is_refused(small, path, silent):
    run, _ = begin(small, path)
    _, other = begin(replace(small, data=DataConfig(train=500)), path.parent / "other")
    with pytest.raises(RunError, match=r"data with fingerprint \w{12}, this data has \w{12}:"):
        next(fit(run, other, silent))


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"optimizer": OptimizerConfig(batch=16)}, "optimizer.batch of .* is 32, .* is 16"),
        ({"seed": 7}, "seed of .* is 0, .* is 7"),
        ({"data": DataConfig(train=320, augment=True)}, "data.augment of .* is False, .* is True"),
    ],
)
def test_batches_of_another_configuration_are_refused(small, path, change, shown, silent):
    run, _ = begin(small, path)
    _, other = begin(replace(small, **change), path.parent / "other")
    remedy = "of these batches .*: give the batches that begin or reopen returns with this run"
    with pytest.raises(RunError, match=shown) as refused:
        next(fit(run, other, silent))
    assert re.search(remedy, str(refused.value))
    assert run.records() == []


def test_pictures_of_another_size_are_refused(small, path, silent):
    write_pictures(path.parent / "mine")
    data = DataConfig("folder", path.parent / "mine", size=16, workers=0)
    config = replace(small, data=data, optimizer=OptimizerConfig(batch=8))
    run, _ = begin(config, path)
    _, other = begin(replace(config, data=replace(data, size=8)), path.parent / "other")
    shown = r"shape of an image of .* is \(3, 16, 16\), that of these batches is \(3, 8, 8\)"
    with pytest.raises(RunError, match=shown):
        next(fit(run, other, silent))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": ModelConfig(depth=15)}, ConfigError),
        ({"model": ModelConfig(kind="densenet", depth=10)}, sd.errors.ApplyError),
        ({"device": "cuda:99"}, ConfigError),
        ({"data": DataConfig(name="cifar10")}, sd.errors.DataError),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(small, path, change, error):
    with pytest.raises(error):
        begin(replace(small, **change), path)
    assert not path.exists()


def test_a_network_without_residual_blocks_is_refused_with_what_trains_it(small, path, silent):
    dense = replace(small, model=ModelConfig(kind="densenet", depth=10, growth=4))
    with pytest.raises(sd.errors.ApplyError, match=r"DenseNet .*: give --survival\.rule constant$"):
        begin(dense, path)
    run, _ = finish(path, replace(dense, survival=SurvivalConfig(rule="constant")), silent)
    model, _ = trained_model(*reopen(run.path))
    with pytest.raises(sd.errors.ApplyError, match=r"DenseNet .*: choose a run of another network"):
        handle_or_always_open(model)


def test_a_folder_that_is_no_run_is_refused(path):
    path.mkdir()
    with pytest.raises(RunError, match="not a run folder"):
        open_run(path)
    (path / "config.json").write_text(f'{{"format": {FORMAT}, "id": "x"}}')
    with pytest.raises(RunError, match="damaged or was edited"):
        open_run(path)


def test_the_trained_model_has_the_errors_of_the_journal(small, path, silent):
    run, records = finish(path, small, silent)
    _, images = reopen(path)
    for which, record in (
        ("last", records[-1]),
        ("best", min(records, key=lambda r: r.validation_error)),
    ):
        model, step = trained_model(run, images, which)
        assert step == record.step
        loss, error = evaluate(model, images.evaluate("test"), run.runtime)
        assert (loss, error) == (record.test_loss, record.test_error)


@pytest.mark.parametrize("gone", ["all checkpoints", "the last checkpoint"])
def test_the_final_weights_stand_for_a_last_checkpoint_that_is_gone(small, path, silent, gone):
    survival = SurvivalConfig(final=0.3, schedule=ScheduleConfig("warmup", until=2.0 * 20))
    run, records = finish(path, replace(small, survival=survival), silent)
    checkpoints = sorted(run.checkpoints.folder.iterdir())
    for file in checkpoints[0 if gone == "all checkpoints" else -1 :]:
        file.unlink()
    _, images = reopen(path)
    model, step = trained_model(run, images, "last")
    assert step == records[-1].step
    found = evaluate(model, images.evaluate("test"), run.runtime)
    assert found == (records[-1].test_loss, records[-1].test_error)
    content = run.weights.read_bytes()
    run.weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunError, match="safetensors is damaged, its checksum does not match: put"):
        trained_model(run, images, "last")
    run.weights.unlink()
    if gone == "all checkpoints":
        with pytest.raises(CheckpointError, match="has no checkpoints left: put a copy of"):
            trained_model(run, images, "last")


def test_a_best_checkpoint_that_is_gone_is_not_replaced_by_the_last(small, path, silent):
    run, records = finish(path, small, silent)
    _, images = reopen(path)
    shutil.rmtree(run.checkpoints.folder)
    best = min(records, key=lambda r: r.validation_error)
    if best is records[-1]:
        assert trained_model(run, images, "best")[1] == best.step
    else:
        with pytest.raises(CheckpointError, match="or use the newest one: --checkpoint last"):
            trained_model(run, images, "best")


@pytest.mark.parametrize("killed_at", [4, 20])
def test_a_record_that_is_best_and_has_no_checkpoint_yet_blocks_nothing(
    small, path, silent, monkeypatch, killed_at
):
    save = checkpoint.save_checkpoint

    def killed(path, state):
        if state["step"] == killed_at:
            raise KeyboardInterrupt
        save(path, state)

    monkeypatch.setattr(checkpoint, "save_checkpoint", killed)
    run, images = begin(small, path)
    with pytest.raises(KeyboardInterrupt):
        list(fit(run, images, silent))
    *before, last = run.records()
    assert journal.best_record([*before, last]) is last
    if before:
        for which, record in (("best", journal.best_record(before)), ("last", before[-1])):
            assert trained_model(run, images, which)[1] == record.step
    else:
        with pytest.raises(CheckpointError, match=r"yet: resume it by .* --resume"):
            trained_model(run, images)
    monkeypatch.undo()
    list(fit(*reopen(path), silent))
    assert trained_model(*reopen(path))


def test_a_run_without_a_checkpoint_cannot_be_evaluated(small, path):
    run, images = begin(small, path)
    with pytest.raises(CheckpointError, match="no evaluated checkpoint"):
        trained_model(run, images)


def test_an_error_prints_a_command_that_a_shell_takes_whatever_the_path(small, path):
    path = path.with_name("a run's folder")
    run, images = begin(small, path)
    with pytest.raises(RunError) as existing:
        begin(small, path)
    with pytest.raises(CheckpointError) as untrained:
        trained_model(run, images)
    write_weights(run.weights, {"weight": torch.ones(1)}, {"run": "f" * 32})
    with pytest.raises(RunError) as foreign:
        trained_model(run, images)
    edit_description(path, lambda described: described["runtime"].update(device="cuda:99"))
    with pytest.raises(ConfigError) as elsewhere:
        reopen(path)
    for error in (existing, untrained, foreign, elsewhere):
        _, printed = str(error.value).split("stochastic-depth ")
        assert shlex.split(printed)[:3] == ["train", "--resume", str(path)]
