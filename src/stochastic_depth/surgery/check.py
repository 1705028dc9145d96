"""Prove on a model and an example that its blocks do what they should under their gates.

The truth comes from an independent way: the whole original model runs, branches included, and only
the results of the chosen additions are replaced by their shortcut (`bypassed`).
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from stochastic_depth.errors import ApplyError, StochasticDepthError, UnsupportedBlockError
from stochastic_depth.gates import Gate, GateKind
from stochastic_depth.handle import Block, open_in_training
from stochastic_depth.hooks import refuse_cache
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.edits import ADDITIONS, Site, Sum, find_place, site_of
from stochastic_depth.surgery.find import Example, Found, caller, unsupported
from stochastic_depth.surgery.install import is_installed, ungated_class
from stochastic_depth.surgery.preserve import preserve_state
from stochastic_depth.tensors import largest_difference, tensors_in


@contextmanager
def bypassed(blocks: Iterable[Found], keep: Tensor | None = None) -> Iterator[None]:
    """While entered, the additions of `blocks`, of a model without gates, return their shortcut.

    Args:
        keep: bool [batch]; the samples that the branches are added for all the same.
    """
    additions: list[tuple[nn.Module, Sum]] = []
    occurrences: dict[tuple[Site, int], int] = {}
    with ExitStack() as entered:
        for block in blocks:
            additions += [addition for unit in block.units for addition in unit.additions]
            for unit in block.units:
                occurrences |= {(e.site, e.occurrence): e.side for e in unit.events}
            whole = [u.edits[0][0] for u in block.units if not u.additions and not u.events]
            for module in whole:
                entered.enter_context(_returns(module, lambda module, x: x, keep))
            if isinstance(block.module, Residual):
                entered.enter_context(_returns(block.module, _around, keep))
        entered.enter_context(_Bypass(additions, occurrences, keep))
        yield


class _Bypass(TorchFunctionMode):
    def __init__(
        self,
        additions: list[tuple[nn.Module, Sum]],
        occurrences: dict[tuple[Site, int], int],
        keep: Tensor | None,
    ) -> None:
        super().__init__()
        self.additions, self.occurrences, self.keep = additions, occurrences, keep
        self.met: Counter[Site] = Counter()
        """How often each expression has added."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ADDITIONS and len(args) >= 2:
            site = site_of(sys._getframe(1))
            side = self.occurrences.get((site, self.met[site]))
            self.met[site] += 1
            if side is not None:
                return self._closed(func, args, kwargs or {}, side)
            for module, edit in self.additions:
                if find_place(module, sys._getframe(1)) == edit.place:
                    side = 0 if edit.shortcut == "left" else 1
                    return self._closed(func, args, kwargs or {}, side)
        return func(*args, **(kwargs or {}))

    def _closed(self, func: Callable[..., Any], args: tuple, kwargs: dict, side: int) -> Tensor:
        shortcut = args[side].clone()
        if self.keep is not None:
            shortcut = _mixed(func(args[0].clone(), *args[1:], **kwargs), shortcut, self.keep)
        if getattr(func, "__name__", "") in ("add_", "__iadd__", "addcmul_"):
            return args[0].copy_(shortcut)
        return shortcut


@contextmanager
def _returns(
    module: Any, closed: Callable[[Any, Tensor], Tensor], keep: Tensor | None
) -> Iterator[None]:
    """While entered, `module` returns what `closed` makes of it and its first argument."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return _mixed(output, closed(module, args[0]), keep)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _around(module: Residual, x: Tensor) -> Tensor:
    shortcut = x if module.shortcut is None else module.shortcut(x)
    return shortcut if module.activation is None else module.activation(shortcut.clone())


def _mixed(output: Tensor, shortcut: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return shortcut
    if len(output) != len(keep):
        raise UnsupportedBlockError(
            f"a residual addition is of a tensor {list(output.shape)}, which does not have the "
            f'{len(keep)} samples first: use gate="batch" for this model, or exclude='
        )
    return torch.where(keep.view(-1, *[1] * (output.ndim - 1)), output, shortcut)


CLOSED, OPEN = Gate(open=False), Gate()

TOLERANCE = 1e-5
"""Of closed blocks, relative to the largest output: other sums may be reordered."""

TRAINING_PASSES = 4
"""Passes in training mode with every gate open, in which each block must be reached."""

Outputs = list[Tensor]


@dataclass(frozen=True)
class Truth:
    """Outputs of the original model, with no block closed and with each of `closed`."""

    open: Outputs
    closed: tuple[frozenset[int], ...]
    outputs: tuple[Outputs, ...]
    selected: tuple[Outputs, ...]
    """With each of `closed` open for every other sample."""
    random: bool
    """Whether the model draws random numbers in evaluation."""


@dataclass(frozen=True)
class _Calls:
    """How often each module is called, by name, and the sum of the sizes that it is given."""

    number: Counter[str]
    given: Counter[str]


def closed_sets(blocks: int) -> list[frozenset[int]]:
    """Sets of blocks to close, in which each block and each pair of blocks is told apart.

    All of them; and for each bit of their numbers those that have it, and those that do not:
    1 + 2 log2 L passes instead of L.
    """
    numbers = range(blocks)
    sets = [frozenset(numbers)]
    for bit in range(max(0, blocks - 1).bit_length()):
        sets += [frozenset(n for n in numbers if n >> bit & 1 == value) for value in (1, 0)]
    return list(dict.fromkeys(each for each in sets if each))


def establish(
    model: nn.Module,
    run: Callable[..., Any],
    found: Sequence[Found],
    batch: int | None = None,
    deadline: float = math.inf,
) -> Truth:
    """Run the original model in evaluation mode, its additions bypassed set by set.

    Args:
        run: calls the model; its argument chooses the state of the random number generators.
        batch: the number of samples in the example, for gates for single samples.
        deadline: of `time.monotonic()`, after which no further set is begun.

    Raises:
        ApplyError: when the model gives no tensor that could be compared.
        GateError: when it gives a cache of keys and values.
    """
    outputs, selected, sets = [], [], []
    with preserve_state(model), torch.no_grad():
        model.eval()
        whole = run()
        refuse_cache(whole)
        expected = tensors_in(whole)
        if not expected:
            raise ApplyError(
                f"no tensor was found in what {type(model).__name__} returns, a "
                f"{type(whole).__name__}, so nothing can be proved: return a tensor, a tuple, a "
                "dict or a dataclass of them, or register the class with torch.utils._pytree"
            )
        random = not _are_equal(expected, tensors_in(run(1)))
        keep = None if batch is None else torch.arange(batch, device="cpu") % 2 == 0
        for closed in closed_sets(len(found)):
            if sets and time.monotonic() > deadline:
                break
            blocks = [found[n] for n in closed]
            with bypassed(blocks):
                outputs.append(tensors_in(run()))
            if keep is not None:
                with bypassed(blocks, keep):
                    selected.append(tensors_in(run()))
            sets.append(closed)
    return Truth(expected, tuple(sets), tuple(outputs), tuple(selected), random)


def check(
    model: nn.Module,
    run: Callable[..., Any],
    found: Sequence[Found],
    blocks: Sequence[Block],
    truth: Truth,
    batch: int | None = None,
    kind: GateKind = "batch",
) -> float:
    """Hold the model with gates, which are in `blocks`, against the truth.

    Returns:
        The largest difference with blocks closed, relative to the largest output.

    Raises:
        UnsupportedBlockError: naming the block that differs, or whose branch still runs.
    """
    difference = 0.0
    proof = _Proof(model, run, found, blocks, truth.random)
    with preserve_state(model):
        model.eval()
        with _gates(blocks, OPEN), _calls(model) as usual:
            proof.compare(truth.open, "every gate open", tolerance=0.0)
        for number, (closed, expected) in enumerate(zip(truth.closed, truth.outputs, strict=True)):
            with _gates(blocks, OPEN), _gates([blocks[n] for n in closed], CLOSED):
                with _calls(model) as called:
                    difference = max(difference, proof.closed(closed, expected))
                for n in sorted(closed):
                    if why := _still_called(found[n], usual, called):
                        raise unsupported(found[n].name, found[n].module, why)
                if number < 2:
                    proof.unwatched(expected)
        if batch is not None:
            for closed, expected in zip(truth.closed, truth.selected, strict=True):
                proof.selected(closed, expected, usual, batch, kind)
    return difference


class _Proof:
    """Compares outputs of a model with gates, and says what is wrong where they differ."""

    def __init__(
        self,
        model: nn.Module,
        run: Callable[..., Any],
        found: Sequence[Found],
        blocks: Sequence[Block],
        random: bool,
    ) -> None:
        self.model, self.run, self.found, self.blocks = model, run, found, blocks
        self.random = random

    def compare(self, expected: Outputs, when: str, tolerance: float) -> float:
        """The largest relative difference of the outputs, which must not exceed `tolerance`."""
        difference, why = self._outcome(expected)
        if not difference <= tolerance:
            raise UnsupportedBlockError(f"with {when} {why}{self._remark()}; {self._advice()}")
        return difference

    def closed(self, closed: frozenset[int], expected: Outputs) -> float:
        """As `compare`, with a set of blocks closed; names the one that is wrong."""
        difference, why = self._outcome(expected)
        if difference <= TOLERANCE:
            return difference
        culprits, why = self._culprit(sorted(closed), why)
        names = " and ".join(repr(self.found[n].name) for n in culprits[:3])
        first = self.found[culprits[0]]
        raise unsupported(first.name, first.module, f"with {names} closed {why}{self._remark()}")

    def unwatched(self, expected: Outputs) -> None:
        """The same without hooks, as users run it, with and without gradients."""
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(True)
        try:
            for gradients in (False, True):
                difference, why = self._outcome(expected, gradients)
                if difference > 10 * TOLERANCE:
                    how = "with" if gradients else "without"
                    raise UnsupportedBlockError(
                        f"with blocks closed, in evaluation {how} gradients and without hooks, "
                        f"{type(self.model).__name__} takes another path, on which {why}: replace "
                        f"the fused or cached computation, or {self._advice()}"
                    )
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    def selected(
        self,
        chosen: frozenset[int],
        expected: Outputs,
        usual: _Calls,
        batch: int,
        kind: GateKind,
    ) -> None:
        """A set of blocks with their branches counted for every other sample only."""
        keep = torch.arange(batch, device="cpu") % 2 == 0
        half = (
            Gate(keep=keep, batch=batch)
            if kind == "sample"
            else Gate(samples=keep.nonzero().flatten(), batch=batch)
        )
        blocks = [self.blocks[n] for n in chosen]
        with _gates(self.blocks, OPEN), _gates(blocks, half), _calls(self.model) as called:
            names = " and ".join(repr(self.found[n].name) for n in sorted(chosen)[:3])
            what = f"half of the samples in the branches of {names}"
            self.compare(expected, what, 10 * TOLERANCE)
        for n in sorted(chosen) if kind == "subset" else ():
            block = self.found[n]
            if block.modules and all(called.given[m] == usual.given[m] for m in block.modules):
                raise unsupported(block.name, block.module, "its branch runs on all samples")

    def _outcome(self, expected: Outputs, gradients: bool = False) -> tuple[float, str]:
        """How far the outputs are from `expected`, and that as a sentence."""
        try:
            with torch.set_grad_enabled(gradients):
                outputs = tensors_in(self.run())
        except Exception as error:
            return math.inf, f"the model fails: {type(error).__name__}: {error}"
        if [x.shape for x in outputs] != [x.shape for x in expected]:
            return math.inf, "the model gives tensors of other shapes"
        difference = largest_difference(expected, outputs)
        return difference, (
            f"the output differs from the original's by {difference:.2g} of its largest value "
            "where it should not"
        )

    def _culprit(self, closed: list[int], why: str) -> tuple[list[int], str]:
        """The smallest set that a bisection finds to be wrong, and what is wrong with it."""
        for part in (closed[: len(closed) // 2], closed[len(closed) // 2 :]):
            if not part or len(part) == len(closed):
                continue
            with ungated(self.model), bypassed([self.found[n] for n in part]), torch.no_grad():
                expected = tensors_in(self.run())
            with _gates(self.blocks, OPEN), _gates([self.blocks[n] for n in part], CLOSED):
                difference, wrong = self._outcome(expected)
            if difference > TOLERANCE:
                return self._culprit(part, wrong)
        return closed, why

    def _advice(self) -> str:
        names = ", ".join(repr(block.name) for block in self.found[:1] if block.name)
        return f"exclude= leaves blocks as they are{', say ' + names if names else ''}"

    def _remark(self) -> str:
        if not self.random:
            return ""
        return (
            " (the model itself gives different outputs for the same input: it draws random "
            "numbers in evaluation, and a closed branch draws none)"
        )


@contextmanager
def ungated(model: nn.Module) -> Iterator[None]:
    """While entered, `model` is the original one."""
    installed = [(module, type(module)) for module in model.modules() if is_installed(module)]
    residuals = [(m, m.gates) for m in model.modules() if isinstance(m, Residual)]
    for module, kind in installed:
        module.__class__ = ungated_class(kind)
    for residual, _ in residuals:
        residual.gates = None
    try:
        yield
    finally:
        for module, kind in installed:
            module.__class__ = kind
        for residual, gates in residuals:
            residual.gates = gates


def check_samples(model: nn.Module, example: Example, found: Sequence[Found], batch: int) -> None:
    """Prove that the first dimension is the batch: half of the samples alone give the same.

    Raises:
        ApplyError: when they do not, as time steps do not, or there are too few samples to see.
    """
    remedy = 'use gate="batch", or put the batch first'
    if batch < 2:
        raise ApplyError(
            "gates for single samples need an example of at least two samples, to see that its "
            f"first dimension is the batch; this one has {batch}"
        )
    half = (batch + 1) // 2
    keep = torch.ones(half, dtype=torch.bool, device="cpu")

    def first(value: Any) -> Any:
        is_one = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
        return value[:half] if is_one else value

    with preserve_state(model), torch.no_grad():
        model.eval()
        with bypassed(found, torch.ones(batch, dtype=torch.bool, device="cpu")):
            whole = tensors_in(caller(model, example)())
        try:
            with bypassed(found, keep):
                part = tensors_in(caller(model, tree_map(first, example))())
        except UnsupportedBlockError:
            raise
        except Exception as error:
            raise ApplyError(
                f"gates for single samples need the batch as first dimension of all inputs: with "
                f"{half} of {batch} {type(model).__name__} fails ({type(error).__name__}: "
                f"{error}); {remedy}"
            ) from error
    expected = [x[: len(y)] if x.ndim and y.ndim else y for x, y in zip(whole, part, strict=True)]
    compared = [(x, y) for x, y in zip(expected, part, strict=True) if x.ndim and y.ndim]
    same = all(x.shape == y.shape for x, y in compared)
    if not same or largest_difference(*map(list, zip(*compared, strict=True))) > 1e-3:
        raise ApplyError(
            f"the first dimension of the inputs of {type(model).__name__} is not the batch: the "
            f"first {half} of {batch} alone give other outputs than among the others, as time "
            f"steps do and samples do not; {remedy}"
        )


def still_running(
    model: nn.Module, run: Callable[..., Any], found: Sequence[Found], blocks: Sequence[Block]
) -> list[str]:
    """For each block why its branch runs even when it is closed; empty where it does not.

    Looks at which modules are called, not at values: works on the meta device too.
    """
    with preserve_state(model), torch.no_grad():
        model.eval()
        with _calls(model) as usual:
            run()
        try:
            with _gates(blocks, CLOSED), _calls(model) as called:
                run()
            return [_still_called(block, usual, called) for block in found]
        except Exception:  # one at a time, to see which
            return [_fails(run, block) for block in blocks]


def _fails(run: Callable[..., Any], block: Block) -> str:
    try:
        with _gates([block], CLOSED):
            run()
    except Exception as error:
        return f"with it closed the model fails: {type(error).__name__}: {error}"
    return ""


def _still_called(block: Found, usual: _Calls, called: _Calls) -> str:
    running = [
        name
        for name, calls in block.modules.items()
        if called.number[name] > max(0, usual.number[name] - calls)
    ]
    if running and not (block.mechanism == "registered" and len(running) < len(block.modules)):
        return (
            f"{running[0]!r} of its branch must run even when the block is closed, because the "
            "model needs more of it than what is added"
        )
    return ""


def check_training(
    model: nn.Module,
    run: Callable[..., Any],
    found: Sequence[Found],
    blocks: Sequence[Block],
) -> dict[str, Any]:
    """Passes in training mode: each block is reached when open, and runs nothing when closed.

    Returns:
        What modules of branches held before a pass that leaves a part of its graph on them, by
        name of module and attribute: a closed branch must leave that.

    Raises:
        UnsupportedBlockError: when a block is left out by the model itself, runs on another path
            in training mode, or backward fails, say because something works in place.
    """
    with preserve_state(model), torch.enable_grad():
        model.train()
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        try:
            with _in_training(blocks, [OPEN] * len(blocks)):
                passes = [_counted(model, run, seed) for seed in range(TRAINING_PASSES)]
            left = _left_behind(model, found, before)
            for block in found:
                if why := _left_out(block, passes):
                    raise unsupported(block.name, block.module, why)
            with _in_training(blocks, [CLOSED] * len(blocks)):
                called = _counted(model, run, 0)
            for block in found:
                if why := _still_called(block, passes[0], called):
                    if block.mechanism != "Residual":
                        why += "; or it takes another path in training mode than in evaluation"
                    raise unsupported(block.name, block.module, why)
            every_other = [CLOSED if n % 2 else OPEN for n in range(len(blocks))]
            with _in_training(blocks, every_other):
                train_once(run)
        except StochasticDepthError:
            raise
        except Exception as error:
            if not _original_trains(model, run):
                return {}  # the example is not one to train on
            raise UnsupportedBlockError(
                f"a training step of {type(model).__name__} with every other block closed fails: "
                f"{error}; exclude= leaves blocks as they are"
            ) from error
    return left


def _original_trains(model: nn.Module, run: Callable[..., Any]) -> bool:
    try:
        with ungated(model):
            train_once(run)
    except Exception:
        return False
    return True


def _counted(model: nn.Module, run: Callable[..., Any], seed: int) -> _Calls:
    with _calls(model) as calls:
        refuse_cache(run(seed))
    return calls


def _left_out(block: Found, passes: Sequence[_Calls]) -> str:
    """Why a block is not reached in each of some passes with every gate open."""
    for unit in block.units:
        reached = [any(calls.number[name] for name in unit.modules) for calls in passes]
        if unit.modules and not all(reached):
            often = f"{len(reached) - sum(reached)} of {len(reached)}"
            return (
                f"in {often} passes in training mode the model leaves it out by itself: set its "
                "own layer drop or drop path to 0, whose job is taken over"
            )
    return ""


def _left_behind(
    model: nn.Module, found: Sequence[Found], before: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Attributes of modules of branches that hold a part of a graph, and what was there before."""
    left: dict[str, Any] = {}
    names = {name: block for block in found for name in block.modules}
    for name, block in names.items():
        for attribute, value in vars(model.get_submodule(name)).items():
            is_left = isinstance(value, Tensor) and value.grad_fn is not None
            if not is_left or isinstance(value, nn.Parameter):
                continue
            old = before[name].get(attribute)
            if attribute not in before[name] or (
                isinstance(old, Tensor) and old.grad_fn is not None
            ):
                raise unsupported(
                    block.name,
                    block.module,
                    f"its branch leaves {attribute!r} on {name!r}, a part of the graph, which "
                    "would be of an earlier step while the block is closed: give it a first value "
                    f"in __init__ (torch.zeros(()), say) that holds then",
                )
            left[f"{name}.{attribute}"] = old
    return left


def train_once(run: Callable[..., Any]) -> None:
    """A forward pass, and the backward pass of the sum of all that it gives."""
    output = run()
    refuse_cache(output)
    differentiable = [out for out in tensors_in(output) if out.requires_grad]
    if differentiable:
        torch.stack([out.float().sum() for out in differentiable]).sum().backward()


@contextmanager
def _in_training(blocks: Sequence[Block], gates: Sequence[Gate]) -> Iterator[None]:
    """While entered, what `blocks` do in training."""
    open_in_training(blocks, gates)
    try:
        yield
    finally:
        open_in_training(blocks, [None] * len(blocks))


@contextmanager
def _gates(blocks: Sequence[Block], gate: Gate) -> Iterator[None]:
    """While entered, what `blocks` do in evaluation."""
    gates = [addition for block in blocks for addition in block.gates]
    before = [addition.evaluation for addition in gates]
    for addition in gates:
        addition.evaluation = gate
    try:
        yield
    finally:
        for addition, value in zip(gates, before, strict=True):
            addition.evaluation = value


@contextmanager
def _calls(model: nn.Module) -> Iterator[_Calls]:
    calls = _Calls(Counter(), Counter())

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            calls.number[name] += 1
            calls.given[name] += sum(tensor.numel() for tensor in tensors_in((args, kwargs)))

        return hook

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _are_equal(one: Outputs, other: Outputs) -> bool:
    shapes = [x.shape for x in one] == [x.shape for x in other]
    return shapes and largest_difference(one, other) == 0
