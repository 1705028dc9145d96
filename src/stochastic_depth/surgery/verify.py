"""Prove on a model and an example that its sliced blocks do what they should."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stochastic_depth.depth import Block
from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.gates import Gate
from stochastic_depth.surgery.bypass import Bypass
from stochastic_depth.surgery.find import Found, unsupported
from stochastic_depth.surgery.undisturbed import undisturbed

CLOSED, OPEN = Gate(open=False), Gate()
SUBSETS = 3
"""Random sets of closed blocks that are tried besides each block alone."""

Outputs = list[Tensor]


@dataclass(frozen=True)
class Truth:
    """Outputs of the original model, with no block closed and with each of `closed`."""

    open: Outputs
    closed: tuple[frozenset[int], ...]
    outputs: tuple[Outputs, ...]


def establish(model: nn.Module, run: Callable[[], Any], found: Sequence[Found]) -> Truth:
    """Run the original model in evaluation mode, its additions bypassed set by set."""
    foreign = [number for number, block in enumerate(found) if block.sites]
    sets = [frozenset([number]) for number in foreign]
    choose = random.Random(0)
    for _ in range(SUBSETS):
        sets.append(frozenset(number for number in foreign if choose.random() < 0.5))
    with undisturbed(model):
        model.eval()
        outputs = []
        for closed in sets:
            sites = [(found[n].module, site) for n in closed for site in found[n].sites]
            with torch.no_grad(), Bypass(sites):
                outputs.append(_outputs(run()))
        with torch.no_grad():
            return Truth(_outputs(run()), tuple(sets), tuple(outputs))


def check(
    model: nn.Module,
    run: Callable[[], Any],
    found: Sequence[Found],
    blocks: Sequence[Block],
    truth: Truth,
) -> None:
    """Hold the sliced model, whose gates are in `blocks`, against the truth.

    Raises:
        UnsupportedBlockError: naming the block that differs, or whose branch still runs.
    """
    with undisturbed(model):
        model.eval()
        with _calls(model) as usual:
            _compare(run, truth.open, "every gate open", exact=True)
        for closed, expected in zip(truth.closed, truth.outputs, strict=True):
            what = " and ".join(repr(found[n].name) for n in sorted(closed)[:3]) or "none"
            with _closed([blocks[n] for n in closed]), _calls(model) as called:
                _compare(run, expected, f"block {what} closed", exact=False)
            for n in closed:
                for name, calls in found[n].modules.items():
                    if called[name] > usual[name] - calls:
                        raise unsupported(
                            found[n].name,
                            found[n].module,
                            f"{name!r} of its branch must run even when the block is closed, "
                            "because the model needs more of it than what is added",
                        )


def check_training(model: nn.Module, run: Callable[[], Any], blocks: Sequence[Block]) -> None:
    """One forward and backward pass in training mode, every other block closed.

    Raises:
        UnsupportedBlockError: when backward fails, say because something works in place.
    """
    with undisturbed(model), torch.enable_grad():
        model.train()
        try:
            for number, block in enumerate(blocks):
                block.open_in_training(CLOSED if number % 2 else OPEN)
            differentiable = [out for out in _outputs(run()) if out.requires_grad]
            if differentiable:
                torch.stack([out.float().sum() for out in differentiable]).sum().backward()
        except Exception as error:
            raise UnsupportedBlockError(
                f"a training step of {type(model).__name__} with every other block closed fails: "
                f"{error} (if the original fails so too, the example is not one to train on); "
                "exclude= leaves blocks as they are"
            ) from error
        finally:
            for block in blocks:
                block.open_in_training(None)


@contextmanager
def _closed(blocks: Sequence[Block]) -> Iterator[None]:
    gates = [gate for block in blocks for gate in block.gates]
    before = [gate.evaluation for gate in gates]
    for gate in gates:
        gate.evaluation = CLOSED
    try:
        yield
    finally:
        for gate, value in zip(gates, before, strict=True):
            gate.evaluation = value


@contextmanager
def _calls(model: nn.Module) -> Iterator[Counter[str]]:
    """How often each module is called, by name."""
    called: Counter[str] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.update([name]))
        for name, module in model.named_modules()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _compare(run: Callable[[], Any], expected: Outputs, when: str, exact: bool) -> None:
    try:
        with torch.no_grad():
            outputs = _outputs(run())
    except Exception as error:
        raise UnsupportedBlockError(
            f"with {when} the model fails: {type(error).__name__}: {error}; exclude= leaves blocks "
            "as they are"
        ) from error
    for mine, true in zip(outputs, expected, strict=True):
        if exact and torch.equal(mine, true):
            continue
        scale = true.abs().max().item() if true.numel() else 0.0
        difference = (mine.double() - true.double()).abs().max().item() if true.numel() else 0.0
        if exact or not difference <= 1e-5 * max(scale, 1e-30):
            raise UnsupportedBlockError(
                f"with {when} the output differs from the original's by {difference:.2g} where "
                f"it should not (largest value {scale:.2g}); exclude= leaves blocks as they are"
            )


def _outputs(value: Any) -> Outputs:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
