"""The learning rate as a function of the step."""

from stochastic_depth.train.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """The rate of `step` (from 0) in a run of `steps` steps.

    The paper, section 4: 0.1, divided by 10 at 50 % and 75 % of the run.
    """
    if step < config.warmup_epochs * steps_per_epoch:
        return config.warmup_rate
    passed = sum(step >= fraction * steps for fraction in config.milestones)
    return config.learning_rate / config.divisor**passed
