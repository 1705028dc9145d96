"""The handle of a model with stochastic depth: its probabilities, its gates and their state."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from threading import get_ident
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from stochastic_depth.block import Block, set_evaluation_gates, set_training_gates
from stochastic_depth.choices import Closed, GateKind, Scale, SkippedPolicy
from stochastic_depth.draw import draw, integer, open_share, step_number
from stochastic_depth.errors import GateError, StateError
from stochastic_depth.gate_settings import GateSettings
from stochastic_depth.gates import Gate, evaluation_gates, training_gates
from stochastic_depth.survival import Probabilities
from stochastic_depth.torch_private import graph_exporter, next_node_number


class RankSamples(NamedTuple):
    """The samples of one process, in a mini-batch that several processes share."""

    first: int
    """The position of its first sample in the mini-batch."""
    whole: int
    """How many samples the mini-batch has."""


class Forced(NamedTuple):
    """Gates that a user has given, in place of drawn ones."""

    coins: Tensor
    scaled: bool
    """Whether to apply the evaluation factor to open branches."""


_ROUNDING = 0.05
"""How much the share of samples on which a block runs may differ from p_l, relative to it, before
there is a warning."""


def _warn_of_rounding(sentence: str) -> None:
    remedy = 'give scale="training", which divides by the share itself, or larger batches'
    warnings.warn(f"{sentence}: {remedy}", stacklevel=4)


class Passes(Protocol):
    """The forward passes of a model, which `hooks.ForwardHooks` follows."""

    def forward_pass(self, gates: list[Gate]) -> AbstractContextManager[None]:
        """A context in which the blocks have these gates, as in a forward pass of the model."""
        ...

    def running_gates(self) -> list[Gate] | None:
        """The gates of the running forward pass, or None if none runs."""
        ...

    def let_blocks_recall(self) -> None:
        """Let the blocks ask, when they are recomputed, which gates their forward pass had."""
        ...


class Handle:
    """The handle that `sd.apply` returns: survival probabilities, gates and their state.

    All gates of a step are drawn at once when the model's forward pass begins in training mode, as
    a function of (seed, step).

    Attributes:
        blocks: the blocks, in the order in which they run.
        probabilities: (p_1, ..., p_L) in every training step.
        settings: how gates are drawn, and what they do.
        rank: the rank of this process, if each process draws different gates; otherwise None.
        rank_samples: for gates of single samples, if several processes share a mini-batch: which of
            its samples are in this process. It may be set, also as (first, whole).
        balanced_parts: how many processes share a mini-batch, in equal parts; each is balanced.
        optimizer_steps: if a training loop's integration has set it, the count of optimizer steps:
            each draw is for that step, whatever `step` was. A copy of the model has None.

    Examples:
        >>> model = sd.models.CifarResNet(20)
        >>> handle = sd.apply(model)
        >>> handle
        Handle(9 blocks, p from 0.9444 to 0.5, expected depth 6.5, ..., seed=0, step=0)
        >>> logits = model.train()(torch.randn(4, 3, 32, 32))
        >>> handle.step, torch.equal(handle.gates, handle.gates_at(0))
        (1, True)
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        probabilities: Probabilities,
        settings: GateSettings,
        seed: int,
    ) -> None:
        self.blocks = list(blocks)
        self.probabilities = probabilities
        self.settings = settings
        self.seed = seed
        self.rank: int | None = None
        self.rank_samples: RankSamples | tuple[int, int] | None = None
        self.balanced_parts = 1
        self.optimizer_steps: Callable[[], int] | None = None
        self.passes: Passes | None = None
        """The forward passes of the model; None for a handle that `sd.apply` has not returned."""
        self.observers: list[Callable[[list[Gate] | None], None]] = []
        """Called when a forward pass begins, with its gates; with None in evaluation."""
        self._coins: Tensor | None = None
        self._seen_for_rounding: tuple[Any, ...] = ()
        """The p_l and the shape of the coins for which `_warn_of_rounding` was called last."""
        self._warned_of_rounding = False
        self.on_rounding: Callable[[str], None] = _warn_of_rounding
        """Called once, with a sentence, where evaluation multiplies by another share."""
        self._drawn: int | None = None
        """The step of the last draw, unless `step` was set to a different one since."""
        self._survival: tuple[float, ...] = ()
        self._in_training: Forced | Literal["full depth"] | None = None
        self._in_evaluation: Forced | None = None
        self._step = 0
        self._set_survival(0)
        self.evaluation_since = 0, 0
        """The thread in which the gates of evaluation changed last, and the number of its autograd
        node from which on they are the present ones."""

    @property
    def gate(self) -> GateKind:
        """How gates are drawn: one for the mini-batch, or one for each sample; under "subset",
        the branch runs on the samples whose gates are open."""
        return self.settings.gate

    @property
    def scale(self) -> Scale:
        """Where branches are scaled: by p_l at inference, by 1 / p_l in training, or nowhere."""
        return self.settings.scale

    @property
    def skipped(self) -> SkippedPolicy:
        """What optimizers see of the parameters of closed blocks."""
        return self.settings.skipped

    @property
    def differs_by_rank(self) -> bool:
        """Whether a block may be open in one process and closed in another."""
        return self.gate != "batch" or self.rank is not None

    @property
    def seed(self) -> int:
        """Chooses the sequence of gates. It may be set.

        Raises:
            GateError: when it is set to something that is not an integer.
        """
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = integer("seed", seed)

    @property
    def step(self) -> int:
        """How many training forward passes have drawn gates; the next draw is for this step.

        It may be set. If it is set to the number of the optimizer's step before each forward pass,
        all micro-batches of that step run under the same gates, a schedule counts the optimizer's
        steps, and a checkpoint needs only that number to restore the gates.

        Raises:
            GateError: when it is set to a negative number, or to something that is not an integer.
        """
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        number = step_number(step)
        if number not in (self._step, self._drawn):
            self._drawn = None
            self._set_survival(max(0, number - 1))
        self._step = number

    @property
    def survival(self) -> tuple[float, ...]:
        """(p_1, ..., p_L); under a schedule, the values of the last draw."""
        return self._survival

    @property
    def expected_depth(self) -> float:
        """The expected number of active blocks, the sum of p_l (the paper, section 3)."""
        return math.fsum(self._survival)

    @property
    def gates(self) -> Tensor:
        """The gates of the last step: bool [L], or [L, batch] with gates for single samples.

        These are the gates that were drawn or forced; under `full_depth`, all with p_l > 0 are
        open. As with `nn.Dropout`, what a block does depends on the mode of the module that makes
        its addition. If that module is in evaluation mode in the
        middle of training, as frozen layers are, the block runs and is scaled as in evaluation.

        Raises:
            GateError: before the first draw.
        """
        if self._coins is None:
            raise GateError("no gates yet: they are drawn by the first training forward pass")
        return self._coins.clone()

    def draw(self, batch: int | None = None) -> AbstractContextManager[None]:
        """Draw the gates of the next step. The model's forward pass does this by itself.

        To call parts of the model in training mode, draw gates for them, once for each step:

            with handle.draw():
                features = model.forward_features(images)
            loss(features).backward()

        Args:
            batch: the number of samples; needed by the "sample" and "subset" gates.

        Returns:
            A context. The gates are in force until it is left, and again in the backward pass of
            everything that was computed inside. If it is not entered, the gates are only stored in
            `handle.gates`. Inside the forward pass of a `DistributedDataParallel`, give that
            `find_unused_parameters=True`, because the output of the parts is not known here. For
            the same reason, an optimizer that steps in the backward pass leaves closed blocks alone
            whose input needs no gradient, or that reentrant checkpointing runs.

        Raises:
            GateError: when `sd.apply` has not returned this handle; or when gates for single
                samples are to be drawn and `batch` is not given.
        """
        if self.passes is None:
            raise GateError("this handle has no model: use the one that sd.apply has returned")
        return self.passes.forward_pass(self.next_gates(batch))

    def next_gates(self, batch: int | None = None) -> list[Gate]:
        """Draw what each block does in the next training step, and count the step.

        While gates are forced, these are returned, and no step is counted.

        Raises:
            GateError: when gates for single samples are to be drawn and `batch` is not given; and
                while torch.jit.trace or torch.export traces the model.
        """
        if self._in_training is not None:
            gates = self._gates_while_forced()
            if self._in_training == "full depth":
                self._coins = torch.tensor([gate.open for gate in gates], device="cpu")
            else:
                self._coins = self._in_training.coins
            return gates
        _refuse_trace()
        self._require_number_of_samples(batch)
        if self.optimizer_steps is not None:
            self.step = self.optimizer_steps()
        self._set_survival(self.step)
        first, whole = self.rank_samples or (0, batch)
        coins = self._draw(self.step, whole, self._survival)
        self._coins = coins if coins.ndim == 1 else coins[:, first : first + (batch or 0)]
        self._warn_of_rounding(self._coins)
        self._drawn, self._step = self._step, self._step + 1
        return training_gates(
            self._coins,
            self._survival,
            self.gate,
            self.scale,
            self._shares(self._coins) if self.scale == "training" else None,
            self.settings.closed,
        )

    def _shares(self, coins: Tensor) -> Sequence[float]:
        """The share of the samples that each block runs on in expectation, under coins like these.

        It is p_l; but balanced gates open a rounded share, and a smallest subset opens more.
        """
        if coins.ndim == 1:
            return self._survival
        samples = coins.shape[1]
        return self._open_shares(self._survival, samples, *(self.rank_samples or (0, samples)))

    def shares_at(
        self, step: int, batch: int, samples: int | None = None, first: int = 0
    ) -> tuple[float, ...]:
        """The share of the samples on which each block is expected to run in a training step.

        It is p_l, unless the number of samples is rounded, as it is by balanced gates for single
        samples, or has a minimum.

        Args:
            batch: the number of samples of all processes together.
            samples: how many of them to look at; all when not given.
            first: the first one of these.

        Examples:
            >>> handle = sd.apply(sd.models.CifarResNet(8), gate="subset", balance=True)
            >>> handle.survival[-1], handle.shares_at(0, batch=9)[-1] == 4 / 9
            (0.5, True)
        """
        looked_at = batch if samples is None else samples
        return tuple(self._open_shares(self.survival_at(step), looked_at, first, batch))

    def _open_shares(
        self, survival: Sequence[float], samples: int, first: int, whole: int
    ) -> Sequence[float]:
        settings = self.settings
        rounds = settings.balance or settings.min_samples > 0
        if self.gate == "batch" or not rounds:
            return survival
        return [
            open_share(
                p,
                samples,
                first=first,
                whole=whole,
                min_samples=settings.min_samples,
                balance=settings.balance,
                multiple_of=settings.multiple_of,
                parts=self.balanced_parts,
            )
            for p in survival
        ]

    def _warn_of_rounding(self, coins: Tensor) -> None:
        """Warn, once, where evaluation multiplies by p_l and training opens a different share."""
        if self._warned_of_rounding or self.scale != "inference" or coins.ndim == 1:
            return
        case = self._survival, coins.shape
        if case == self._seen_for_rounding:
            return
        self._seen_for_rounding = case
        blocks = zip(self._shares(coins), self._survival, self.blocks, strict=True)
        changes = [(abs(share / p - 1), share, p, block.name) for share, p, block in blocks if p]
        change, share, p, name = max(changes, default=(0.0, 1.0, 1.0, ""))
        if change > _ROUNDING:
            self._warned_of_rounding = True
            self.on_rounding(
                f"block {name!r} runs on {100 * share:.0f} % of the samples, because their number "
                f"is rounded, but evaluation multiplies its branch by p_l = {p:.3g}"
            )

    def gates_at(self, step: int, batch: int | None = None) -> Tensor:
        """The gates that training step `step` draws, past or future, in the form of `gates`.

        Args:
            batch: the number of samples of all processes together; needed by the "sample" and
                "subset" gates.

        Raises:
            GateError: when `step` is not an integer from 0, or `batch` is missing.

        Examples:
            >>> handle = sd.apply(sd.models.CifarResNet(8))  # of 3 blocks
            >>> handle.gates_at(1000).shape, handle.step
            (torch.Size([3]), 0)
        """
        step = step_number(step)
        self._require_number_of_samples(batch)
        return self._draw(step, batch, self.survival_at(step))

    def _require_number_of_samples(self, batch: int | None) -> None:
        if self.gate != "batch" and batch is None:
            raise GateError(
                f'gate="{self.gate}" draws a gate for each sample: give the number of samples, '
                "handle.draw(batch) or handle.gates_at(step, batch)"
            )

    def _draw(self, step: int, batch: int | None, survival: tuple[float, ...]) -> Tensor:
        return draw(
            self.seed,
            step,
            survival,
            None if self.gate == "batch" else batch,
            self.settings.min_samples,
            balance=self.settings.balance,
            multiple_of=self.settings.multiple_of,
            parts=self.balanced_parts,
            rank=self.rank,
        )

    def survival_at(self, step: int) -> tuple[float, ...]:
        """(p_1, ..., p_L) in training step `step`."""
        return self.probabilities.at(step)

    @contextmanager
    def forced(self, gates: Sequence[bool] | Tensor, *, scaled: bool = False) -> Iterator[None]:
        """While entered, the blocks have these gates, in training and in evaluation.

            with handle.forced([True] * len(handle.blocks)):
                logits = model(images)

        The branch of a closed block is not executed; under closed="forward-only" it runs without a
        graph in training. Nothing is drawn and no step is counted. Parts of the model may be called
        too. Afterwards the earlier gates are in force again. Contexts may be nested: the innermost
        one counts. They hold in all threads; a copy of the model that is made meanwhile has its
        usual gates.

        Args:
            gates: which blocks are open, bool [L]; or for which samples, bool [L, batch]. With all
                blocks open this is the full network, unscaled.
            scaled: apply the evaluation factor to open branches (p_l under scale="inference"); if
                False, scale as in training: not at all (the paper), or by 1 / p_l under
                scale="training".

        Raises:
            GateError: when `gates` is not bool [L] or [L, batch]; or when the model returns a
                key/value cache, to which closed blocks add no entries.
        """
        forced = self._as_forced(gates, scaled, dimensions=(1, 2))
        with self._in_force(forced, forced):
            yield

    @contextmanager
    def subnetwork(self, gates: Sequence[bool] | Tensor, *, scaled: bool = False) -> Iterator[None]:
        """While entered, the model in evaluation mode is one of its 2^L subnetworks.

            with handle.subnetwork(handle.gates):
                logits = model(images)

        It is `forced` for evaluation only: training steps are not affected.

        Args:
            gates: which blocks are open, bool [L].
            scaled: as for `forced`.

        Raises:
            GateError: as `forced`.
        """
        forced = self._as_forced(gates, scaled, dimensions=(1,))
        with self._in_force(self._in_training, forced):
            yield

    @property
    def is_subnetwork(self) -> bool:
        """Whether a context of `forced` or `subnetwork` is entered."""
        return self._in_evaluation is not None

    @contextmanager
    def full_depth(self) -> Iterator[None]:
        """While entered, training forward passes have the gates of evaluation.

        No gates are drawn, no block is dropped, and branches are scaled as `scale` says. (A block
        with p_l = 0 stays closed.) It is meant for procedures that need training mode and the whole
        network, such as `torch.optim.swa_utils.update_bn`. Under gates, a BatchNorm in the branch
        of a closed block would see nothing, and all others would see a network that is never
        evaluated.

        Examples:
            >>> model = sd.models.CifarResNet(8)
            >>> handle = sd.apply(model)
            >>> with handle.full_depth():
            ...     logits = model.train()(torch.randn(2, 3, 8, 8))
            >>> handle.step
            0
        """
        with self._in_force("full depth", self._in_evaluation):
            yield

    @contextmanager
    def _in_force(
        self, training: Forced | Literal["full depth"] | None, evaluation: Forced | None
    ) -> Iterator[None]:
        """While entered, these gates are in force; None for the usual ones."""
        before = self._in_training, self._in_evaluation
        self._in_training, self._in_evaluation = training, evaluation
        self._change_evaluation()
        self.restore_gates()
        try:
            yield
        finally:
            self._in_training, self._in_evaluation = before
            self._change_evaluation()
            self.restore_gates()

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint needs, so that a resumed training run has the same gates.

        Examples:
            >>> handle = sd.apply(sd.models.CifarResNet(8))
            >>> handle.state_dict()["step"]
            0
        """
        return {"seed": self.seed, "step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` has returned.

        A function that is not a dataclass is compared by its name, and a rule of (block, blocks,
        step) by its p_l in step 0 as well: whether it is the same in later steps is not known.

        Raises:
            StateError: when it was saved under different survival probabilities, gates or scaling.
        """
        try:
            seed, step = integer("seed", state.get("seed")), step_number(state.get("step"))
        except GateError as error:
            raise StateError(
                f"the saved state has {error}; give what handle.state_dict() returned"
            ) from None
        for name, mine in self._identity().items():
            if name not in state or state[name] != mine:
                raise StateError(
                    f"the saved state has {name}={state.get(name)!r}, this model {mine!r}: "
                    "apply stochastic depth with the settings of the run that is resumed"
                )
        self.seed, self._step = seed, step
        self._set_survival(max(0, self._step - 1))
        self._coins, self._drawn = None, self._step - 1
        self.restore_gates()

    def _set_survival(self, step: int) -> None:
        survival = self.survival_at(step)
        if survival == self._survival:
            return
        self._survival = survival
        self._change_evaluation()

    def _as_forced(
        self, gates: Sequence[bool] | Tensor, scaled: bool, dimensions: tuple[int, ...]
    ) -> Forced:
        """The gates that a user has given, as coins.

        Raises:
            GateError: when their type or shape is wrong.
        """
        blocks = len(self.blocks)
        form = f"bool [{blocks}], one gate for each block"
        form += f", or bool [{blocks}, batch]" if 2 in dimensions else ""
        try:
            coins = torch.as_tensor(gates, device="cpu").clone()
        except (TypeError, ValueError, RuntimeError) as error:  # or rows of different lengths
            raise GateError(f"gates are given as {form}, not as {gates!r}") from error
        if coins.dtype != torch.bool or coins.ndim not in dimensions or len(coins) != blocks:
            given = f"{coins.dtype} {list(coins.shape)}"
            raise GateError(f"gates are given as {form}, not as {given}")
        return Forced(coins, scaled)

    def _gates_of(self, forced: Forced, closed: Closed = "skipped") -> list[Gate]:
        """The gates that a user has given, one for each block.

        Args:
            closed: what closed blocks do, where all samples have the same gate.
        """
        kind: GateKind = "batch"
        if forced.coins.ndim == 2:
            kind = "sample" if self.gate == "batch" else self.gate
            closed = "skipped"
        shares = self._shares(forced.coins)
        gates = training_gates(forced.coins, self._survival, kind, self.scale, shares, closed)
        if not forced.scaled:
            return gates
        whole = evaluation_gates(self._survival, self.scale)
        return [g._replace(factor=w.factor) for g, w in zip(gates, whole, strict=True)]

    def _gates_while_forced(self) -> list[Gate]:
        """What each block does in training while gates are forced."""
        if isinstance(self._in_training, Forced):
            return self._gates_of(self._in_training, self.settings.closed)
        return [block.evaluation_gate for block in self.blocks]

    @torch.inference_mode(False)  # a factor made in inference mode could not be used in training
    def restore_gates(self) -> None:
        """Give all blocks the training gates that are in force: forced ones; or those of the
        running forward pass; or none."""
        forced = self._in_training is not None
        running = None if self.passes is None else self.passes.running_gates()
        gates = self._gates_while_forced() if forced else running
        set_training_gates(self.blocks, gates or [None] * len(self.blocks))

    def _change_evaluation(self) -> None:
        """Give all blocks other gates of evaluation, and note when."""
        self.evaluation_since = get_ident(), next_node_number()
        if self.passes is not None:
            self.passes.let_blocks_recall()
        self.restore_evaluation_gates()

    @torch.inference_mode(False)
    def restore_evaluation_gates(self) -> None:
        """Give all blocks the gates of evaluation that are in force: forced ones, or p_l's."""
        forced = self._in_evaluation
        set_evaluation_gates(
            self.blocks,
            evaluation_gates(self._survival, self.scale),
            None if forced is None else self._gates_of(forced),
        )
        if self._in_training == "full depth":
            self.restore_gates()

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy: no gates are forced, and no optimizer is followed."""
        usual = {"_in_training": None, "_in_evaluation": None, "optimizer_steps": None}
        return {**self.__dict__, **usual, "observers": [], "evaluation_since": (0, 0)}

    def _identity(self) -> dict[str, Any]:
        return self.probabilities.to_json() | asdict(self.settings)

    def __repr__(self) -> str:
        return (
            f"Handle({len(self.blocks)} blocks, p from {self._survival[0]:.4g} to "
            f"{self._survival[-1]:.4g}, expected depth {self.expected_depth:.4g}, "
            f"gate={self.gate!r}, {self._unusual()}scale={self.scale!r}, "
            f"skipped={self.skipped!r}, seed={self.seed}, step={self.step})"
        )

    def _unusual(self) -> str:
        """The settings that `repr` shows only if they differ from the default."""
        schedule = self.probabilities.to_json()["schedule"]
        shown = ["balanced"] if self.settings.balance else []
        shown += [f"schedule={schedule['name']}"] if schedule else []
        closed = self.settings.closed
        shown += [f"closed={closed!r}"] if closed == "forward-only" else []
        return "".join(f"{each}, " for each in shown)


def _refuse_trace() -> None:
    """Raise `GateError` while PyTorch records the forward pass as a graph."""
    exporter = graph_exporter()
    if exporter is not None:
        raise GateError(
            f"{exporter} traces the model in training mode, and the graph would have the gates of "
            "this one pass for ever: call model.eval() before the trace"
        )
