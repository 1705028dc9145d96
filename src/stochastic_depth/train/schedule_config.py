"""The configuration of a schedule: how the drop rates of a run change over its steps."""

import math
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Literal

import tyro

from stochastic_depth.errors import ConfigError
from stochastic_depth.schedules import Decreasing, Early, Late, Progressive, Schedule, Steps, Warmup
from stochastic_depth.train.checks import check_that, finite


@dataclass(frozen=True)
class ScheduleConfig:
    """How the drop rates change during the training."""

    kind: Annotated[
        Literal["none", "warmup", "early", "late", "decreasing", "progressive", "steps"],
        tyro.conf.arg(name="schedule", prefix_name=False),
    ] = "none"
    """How drop rates change. warmup: grow to those of the rule until `until`. early: fall to 0
    until `until`. late: stay 0 until `until`. decreasing: fall to 0 from `since` to `until`.
    progressive: approach those of the rule with `gamma`. steps: a share of them from each step
    on."""
    until: float = 0.5
    """A share of the training, or a number of steps if above 1."""
    since: float = 0.0
    """Where decreasing begins: a share of the training, or a number of steps if above 1."""
    shape: Literal["linear", "constant"] = "linear"
    """How the drop rates of early end: linearly, or at once (constant)."""
    gamma: float = 0.001
    """Rate of the progressive schedule, per step."""
    at: tuple[float, ...] = (0.0, 0.5)
    """Where each of `shares` begins: shares of the training, or numbers of steps if above 1."""
    shares: tuple[float, ...] = (0.5, 1.0)
    """For steps: the shares of the rule's drop rates."""

    def __post_init__(self) -> None:
        check_that(self.until > 0, "schedule.until", self.until, "above 0")
        check_that(self.since >= 0, "schedule.since", self.since, "at least 0")
        check_that(self.gamma > 0, "schedule.gamma", self.gamma, "above 0")
        for start in self.at:
            check_that(start >= 0 and math.isfinite(start), "schedule.at", start, "at least 0")
        for share in self.shares:
            check_that(0 <= share <= 1, "schedule.shares", share, "from 0 to 1")
        if len(self.at) != len(self.shares):
            raise ConfigError(
                f"schedule.at has {len(self.at)} values and schedule.shares {len(self.shares)}: "
                "give a share of the drop rates for each step"
            )
        finite("schedule", self)
        for setting, problem in self.unused().items():
            if getattr(self, setting) != getattr(ScheduleConfig, setting):
                raise ConfigError(problem)
        in_one_unit = (self.since <= 1) == (self.until <= 1)
        if self.kind == "decreasing" and in_one_unit and self.since >= self.until:
            raise self._never_decreasing()
        if self.kind == "steps" and (not self.at or len(set(self.at)) < len(self.at)):
            raise ConfigError(
                f"schedule.at is {list(self.at)}: give at least one step, and each step once"
            )

    def unused(self) -> dict[str, str]:
        """The settings that this kind of schedule does not use, and what to do about each."""
        return {
            setting: f"schedule.{setting} is {getattr(self, setting)}, which has no effect where "
            f"schedule is {self.kind}: leave it out, or give --schedule "
            f"{' or '.join(kind for kind, used in SETTINGS.items() if setting in used)}"
            for setting in dict.fromkeys(chain(*SETTINGS.values()))
            if setting not in SETTINGS[self.kind]
        }

    def require_effect(self, steps: int) -> None:
        """Refuse a schedule that cannot do in a training run of `steps` steps what it says.

        Raises:
            ConfigError: when it drops no block in any step, or ends before it begins.
            SurvivalError: when two of its steps are one and the same.
        """
        if self.kind == "decreasing" and _in_steps(self.since, steps) >= _in_steps(
            self.until, steps
        ):
            raise self._never_decreasing()
        schedule = self.of(steps)
        if schedule is not None and not any(schedule(step) for step in range(steps)):
            raise ConfigError(
                f"schedule is {self.name}, which drops no block in any of the {steps:,} steps of "
                "this training: let it begin earlier, with shares above 0; or, for constant "
                "depth, give --survival.rule constant in its place"
            )

    def _never_decreasing(self) -> ConfigError:
        return ConfigError(
            f"schedule.since is {self.since:g} and schedule.until is {self.until:g}: give a "
            "--schedule.since below --schedule.until"
        )

    @property
    def name(self) -> str:
        """The kind and the settings that it uses: "early until 0.3 linear"."""
        words: list[str] = [self.kind]
        for setting in SETTINGS[self.kind]:
            value = getattr(self, setting)
            if setting == "shape":
                words.append(value)
            elif isinstance(value, tuple):
                words += [setting, "/".join(f"{each:g}" for each in value)]
            else:
                words += [setting, f"{value:g}"]
        return " ".join(words)

    def of(self, steps: int) -> Schedule | None:
        """The schedule for a training run of `steps` steps; None where drop rates are constant."""
        until, since, *at = (round(_in_steps(x, steps)) for x in (self.until, self.since, *self.at))
        until = max(until, since + 1)  # where rounding makes them equal
        match self.kind:
            case "warmup":
                return Warmup(until)
            case "early":
                return Early(until, self.shape)
            case "late":
                return Late(until)
            case "decreasing":
                return Decreasing(since, until)
            case "progressive":
                return Progressive(self.gamma)
            case "steps":
                return Steps(zip(at, self.shares, strict=True))
            case "none":
                return None


def _in_steps(time: float, steps: int) -> float:
    """A number of steps; `time` is one already if it is above 1, otherwise a share of `steps`."""
    return time * steps if time <= 1 else time


SETTINGS = {
    "none": (),
    "warmup": ("until",),
    "early": ("until", "shape"),
    "late": ("until",),
    "decreasing": ("since", "until"),
    "progressive": ("gamma",),
    "steps": ("at", "shares"),
}
"""The settings that each kind of schedule uses."""
