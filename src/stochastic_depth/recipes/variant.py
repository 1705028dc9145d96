"""A recipe that differs from another in one thing."""

from dataclasses import replace

from stochastic_depth.train.config import Config, ScheduleConfig


def constant_depth(config: Config) -> Config:
    """`config` without stochastic depth: every block in every step."""
    return replace(config, survival=replace(config.survival, rule="constant"))


def gatings(config: Config) -> dict[str, Config]:
    """`config` under every gating at equal rates, by name; at constant depth too."""
    survival = replace(
        config.survival, gate="batch", balance=False, closed="skipped", schedule=ScheduleConfig()
    )
    early = ScheduleConfig("early", until=0.5)
    variants = {
        "batch": survival,
        "sample": replace(survival, gate="sample"),
        "subset": replace(survival, gate="subset"),
        "balanced-batch": replace(survival, balance=True),
        "balanced-subset": replace(survival, gate="subset", balance=True),
        "forward-only": replace(survival, closed="forward-only", scale=None),
        "early": replace(survival, schedule=early),
    }
    return {
        "constant": constant_depth(config),
        **{name: replace(config, survival=variant) for name, variant in variants.items()},
    }
