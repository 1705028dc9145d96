import json
import re
from pathlib import Path

import pytest
import tyro

from stochastic_depth.errors import ConfigError, SurvivalError
from stochastic_depth.recipes import RECIPES
from stochastic_depth.schedules import Decreasing, Early, Late, Progressive, Steps, Warmup
from stochastic_depth.train import Config, DataConfig, ModelConfig, OptimizerConfig, SurvivalConfig
from stochastic_depth.train.config import DistributedConfig
from stochastic_depth.train.schedule_config import SETTINGS, ScheduleConfig


@pytest.mark.parametrize("name", RECIPES)
def test_a_configuration_survives_json(name):
    config = RECIPES[name]()
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_paths_and_optional_values_survive_json():
    config = Config(data=DataConfig(root=Path("/a/b"), train=10, augment=False), evaluate_every=3)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Config(epochs=0), "epochs is 0"),
        (lambda: Config(evaluate_every=0), "evaluate-every is 0"),
        (lambda: Config(keep=0), "keep is 0"),
        (lambda: DataConfig(train=0), "data.train is 0"),
        (lambda: DataConfig(size=0), "data.size is 0"),
        (lambda: DataConfig(workers=-1), "data.workers is -1"),
        (lambda: SurvivalConfig(final=0.0), "survival.final is 0.0"),
        (lambda: SurvivalConfig(final=1.5), "survival.final is 1.5"),
        (lambda: ScheduleConfig(until=-1), "schedule.until is -1"),
        (
            lambda: ScheduleConfig(shares=(0.5, 2.0)),
            r"schedule.shares is 2.0: it must be from 0 to 1",
        ),
        (lambda: ScheduleConfig(at=(0.0,)), "schedule.at has 1 values and schedule.shares 2"),
        (
            lambda: ScheduleConfig("steps", at=(), shares=()),
            r"schedule.at is \[\]: give at least one",
        ),
        (
            lambda: ScheduleConfig("steps", at=(0.5, 0.5), shares=(0, 1)),
            r"schedule.at is \[0.5, 0.5\]: give at least one step, and each step once",
        ),
        (
            lambda: ScheduleConfig("decreasing", since=0.9, until=0.1),
            "schedule.since is 0.9 and schedule.until is 0.1: give a --schedule.since below",
        ),
        (lambda: ScheduleConfig("decreasing", since=50, until=20), "schedule.since is 50"),
        (lambda: OptimizerConfig(learning_rate=0), "optimizer.learning-rate is 0"),
        (lambda: OptimizerConfig(momentum=1), "momentum is 1: it must be at least 0 and below 1"),
        (lambda: OptimizerConfig(batch=1), "optimizer.batch is 1"),
        (
            lambda: OptimizerConfig(milestones=(0.5, 1.5)),
            "milestones is 1.5: it must be above 0 and below 1",
        ),
        (lambda: OptimizerConfig(divisor=0), "optimizer.divisor is 0"),
        (lambda: OptimizerConfig(weight_decay=-1), "optimizer.weight-decay is -1"),
        (lambda: SurvivalConfig(final=float("nan")), "survival.final is nan"),
        (lambda: ScheduleConfig(until=float("inf")), "schedule.until is inf"),
        (lambda: OptimizerConfig(learning_rate=float("inf")), "optimizer.learning-rate is inf"),
        (lambda: OptimizerConfig(warmup_epochs=float("nan")), "optimizer.warmup-epochs is nan"),
        (
            lambda: Config(epochs=10, optimizer=OptimizerConfig(warmup_epochs=10)),
            "optimizer.warmup-epochs is 10 and epochs is 10: nothing would be trained at",
        ),
        (lambda: OptimizerConfig(warmup_rate=0), "optimizer.warmup-rate is 0"),
        (lambda: ModelConfig(depth=10**9), "model.depth is 1000000000"),
        (lambda: ModelConfig(growth=0), "model.growth is 0"),
        (lambda: DataConfig(workers=5000), "data.workers is 5000"),
    ],
)
def test_a_value_that_cannot_be_trained_is_named(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        (("epochs",), "many", "config.epochs is 'many'"),
        (("epochs",), True, "config.epochs is True"),
        (("model", "kind"), "vgg", "config.model.kind is 'vgg'"),
        (("survival",), None, "config.survival must have the fields"),
        (("surprise",), 1, "config must have the fields"),
        (("optimizer", "learning_rate"), 10**400, "config.optimizer.learning_rate is 1000"),
        (("optimizer", "weight_decay"), float("inf"), "config.optimizer.weight_decay is inf"),
        (("data", "root"), "a\0b", "config.data.root is 'a"),
    ],
)
def test_foreign_json_is_refused_by_the_field(where, value, named):
    values = Config().to_json()
    inner = values
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(ConfigError, match=named):
        Config.from_json(values)


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        (ScheduleConfig(), None),
        (ScheduleConfig("warmup", until=0.1), Warmup(20)),
        (ScheduleConfig("early", until=50), Early(50)),
        (ScheduleConfig("early", until=0.3, shape="constant"), Early(60, "constant")),
        (ScheduleConfig("late", until=1.0), Late(200)),
        (ScheduleConfig("decreasing", since=0.25, until=0.75), Decreasing(50, 150)),
        (ScheduleConfig("progressive", gamma=0.01), Progressive(0.01)),
        (
            ScheduleConfig("steps", at=(0, 0.25, 150), shares=(0.2, 0.6, 1.0)),
            Steps({0: 0.2, 50: 0.6, 150: 1.0}),
        ),
    ],
)
def test_a_schedule_ends_after_a_share_of_the_training_or_a_number_of_steps(config, schedule):
    assert config.of(200) == schedule


def test_a_schedule_is_named_on_the_command_line_and_comes_back_from_json():
    options = ["--schedule", "early", "--schedule.until", "0.3", "--survival.balance"]
    config = tyro.cli(Config, args=options, default=Config())
    assert config.survival.schedule == ScheduleConfig("early", until=0.3)
    assert config.survival.balance
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_forward_only_has_neither_gates_for_single_samples_nor_a_scale():
    for wrong in ({"gate": "subset"}, {"scale": "training"}):
        with pytest.raises(ConfigError, match=r"survival\.closed is forward-only"):
            SurvivalConfig(closed="forward-only", **wrong)


@pytest.mark.parametrize(
    ("survival", "rank_gates"), [(SurvivalConfig(gate="subset"), False), (SurvivalConfig(), True)]
)
def test_batch_normalisation_over_ranks_needs_the_same_gates_on_all(survival, rank_gates):
    with pytest.raises(ConfigError, match="leave one out"):
        Config(
            survival=survival,
            distributed=DistributedConfig(sync_batchnorm=True, rank_gates=rank_gates),
        )


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("until", 0.3),
        ("since", 0.1),
        ("shape", "constant"),
        ("gamma", 5.0),
        ("at", (0.0, 0.3)),
        ("shares", (0.2, 1.0)),
    ],
)
def test_a_setting_that_its_schedule_does_not_use_is_refused_and_the_remedy_works(setting, value):
    for kind, used in SETTINGS.items():
        if setting in used:
            assert ScheduleConfig(kind, **{setting: value})
            continue
        named = re.escape(f"schedule.{setting} is {value}, which has no effect where schedule is ")
        with pytest.raises(ConfigError, match=f"{named}{kind}: leave it out") as refused:
            ScheduleConfig(kind, **{setting: value})
        for remedy in str(refused.value).partition("--schedule ")[2].split(" or "):
            assert ScheduleConfig(remedy, **{setting: value})


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [
        (ScheduleConfig("late", until=1.0), "late until 1, which drops no block in any of the 200"),
        (ScheduleConfig("steps", at=(0.0,), shares=(0.0,)), "drops no block"),
        (ScheduleConfig("steps", at=(300.0,), shares=(1.0,)), "drops no block"),
        (
            ScheduleConfig("decreasing", since=0.9, until=20.0),
            r"since is 0\.9 and schedule\.until is 20",
        ),
        (ScheduleConfig("steps", at=(0.5, 100.0)), "step 100 has two shares"),
    ],
)
def test_a_schedule_without_effect_in_so_many_steps_is_refused(schedule, problem):
    with pytest.raises((ConfigError, SurvivalError), match=problem):
        schedule.require_effect(200)


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_schedule_has_an_effect_by_default(kind):
    ScheduleConfig(kind).require_effect(2)
