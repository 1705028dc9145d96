"""Prove on a model and an example that its blocks do what they should under their gates.

The truth comes from an independent way: the whole original model runs, branches included, and only
the results of the chosen additions are replaced by their shortcut (`bypassed`).
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stochastic_depth.errors import GateError, UnsupportedBlockError
from stochastic_depth.gates import Gate
from stochastic_depth.handle import Block
from stochastic_depth.hooks import refuse_cache
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.edits import ADDITIONS, Site, Sum, find_place, site_of
from stochastic_depth.surgery.find import Found, unsupported
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
SUBSETS = 3
"""Random sets of closed blocks that are tried besides each block alone."""

TOLERANCE = 1e-5
"""Of closed blocks, relative to the largest output: other sums may be reordered."""

Outputs = list[Tensor]


@dataclass(frozen=True)
class Truth:
    """Outputs of the original model, with no block closed and with each of `closed`."""

    open: Outputs
    closed: tuple[frozenset[int], ...]
    outputs: tuple[Outputs, ...]
    selected: tuple[Outputs, ...]
    """With each block open for every other sample."""


@dataclass(frozen=True)
class _Calls:
    """How often each module is called, by name, and the sum of the sizes that it is given."""

    number: Counter[str]
    given: Counter[str]


def establish(
    model: nn.Module, run: Callable[[], Any], found: Sequence[Found], batch: int | None = None
) -> Truth:
    """Run the original model in evaluation mode, its additions bypassed set by set.

    Args:
        batch: the number of samples in the example, for gates that select some of them.
    """
    sets = [frozenset([number]) for number in range(len(found))]
    choose = random.Random(0)
    for _ in range(SUBSETS):
        sets.append(frozenset(number for number in range(len(found)) if choose.random() < 0.5))
    with preserve_state(model), torch.no_grad():
        model.eval()
        outputs, selected = [], []
        for closed in sets:
            with bypassed([found[n] for n in closed]):
                outputs.append(tensors_in(run()))
        if batch is not None:
            keep = torch.arange(batch) % 2 == 0
            for block in found:
                with bypassed([block], keep):
                    selected.append(tensors_in(run()))
        return Truth(tensors_in(run()), tuple(sets), tuple(outputs), tuple(selected))


def check(
    model: nn.Module,
    run: Callable[[], Any],
    found: Sequence[Found],
    blocks: Sequence[Block],
    truth: Truth,
    batch: int | None = None,
) -> float:
    """Hold the model with gates, which are in `blocks`, against the truth.

    Returns:
        The largest difference with a block closed, relative to the largest output.

    Raises:
        UnsupportedBlockError: naming the block that differs, or whose branch still runs.
    """
    difference = 0.0
    with preserve_state(model):
        model.eval()
        with _gates(blocks, OPEN), _calls(model) as usual:
            _compare(run, truth.open, "every gate open", tolerance=0.0)
        for closed, expected in zip(truth.closed, truth.outputs, strict=True):
            what = f"block {' and '.join(repr(found[n].name) for n in sorted(closed)[:3])} closed"
            gates = _gates([blocks[n] for n in closed], CLOSED)
            with _gates(blocks, OPEN), gates, _calls(model) as called:
                difference = max(difference, _compare(run, expected, what, TOLERANCE))
            for n in closed:
                why = _still_called(found[n], usual, called)
                if why:
                    raise unsupported(found[n].name, found[n].module, why)
        for block, gated, expected in zip(
            found if batch else (), blocks, truth.selected, strict=batch is not None
        ):
            gate = Gate(samples=torch.arange(0, batch or 0, 2), batch=batch)
            with _gates(blocks, OPEN), _gates([gated], gate), _calls(model) as called:
                what = f"half of the samples in the branch of block {block.name!r}"
                difference = max(difference, _compare(run, expected, what, 10 * TOLERANCE))
            if block.modules and all(called.given[n] == usual.given[n] for n in block.modules):
                raise unsupported(block.name, block.module, "its branch runs on all samples")
    return difference


def still_running(
    model: nn.Module, run: Callable[[], Any], found: Sequence[Found], blocks: Sequence[Block]
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


def _fails(run: Callable[[], Any], block: Block) -> str:
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
        if called.number[name] > usual.number[name] - calls
    ]
    if running and not (block.mechanism == "registered" and len(running) < len(block.modules)):
        return (
            f"{running[0]!r} of its branch must run even when the block is closed, because the "
            "model needs more of it than what is added"
        )
    return ""


def check_training(model: nn.Module, run: Callable[[], Any], blocks: Sequence[Block]) -> None:
    """One forward and backward pass in training mode, every other block closed.

    Raises:
        UnsupportedBlockError: when backward fails, say because something works in place.
    """
    with preserve_state(model), torch.enable_grad():
        model.train()
        try:
            for number, block in enumerate(blocks):
                block.open_in_training(CLOSED if number % 2 else OPEN)
            train_once(run)
        except GateError:
            raise
        except Exception as error:
            raise UnsupportedBlockError(
                f"a training step of {type(model).__name__} with every other block closed fails: "
                f"{error} (if the original fails so too, the example is not one to train on); "
                "exclude= leaves blocks as they are"
            ) from error
        finally:
            for block in blocks:
                block.open_in_training(None)


def train_once(run: Callable[[], Any]) -> None:
    """A forward pass, and the backward pass of the sum of all that it gives."""
    output = run()
    refuse_cache(output)
    differentiable = [out for out in tensors_in(output) if out.requires_grad]
    if differentiable:
        torch.stack([out.float().sum() for out in differentiable]).sum().backward()


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
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _compare(run: Callable[[], Any], expected: Outputs, when: str, tolerance: float) -> float:
    """The largest relative difference of the outputs, which must not be above `tolerance`."""
    try:
        with torch.no_grad():
            outputs = tensors_in(run())
    except Exception as error:
        raise UnsupportedBlockError(
            f"with {when} the model fails: {type(error).__name__}: {error}; exclude= leaves blocks "
            "as they are"
        ) from error
    difference = largest_difference(expected, outputs)
    if difference > tolerance:
        raise UnsupportedBlockError(
            f"with {when} the output differs from the original's by {difference:.2g} of its "
            "largest value where it should not; exclude= leaves blocks as they are"
        )
    return difference
