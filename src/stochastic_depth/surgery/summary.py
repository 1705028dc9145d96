"""What the blocks of a model cost and what skipping them should save, counted by running."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stochastic_depth.gates import Gate
from stochastic_depth.handle import Block
from stochastic_depth.surgery.apply import handle_of
from stochastic_depth.surgery.find import Example, caller
from stochastic_depth.surgery.flops import CountFlops
from stochastic_depth.surgery.plain_table import plain_table, si
from stochastic_depth.surgery.preserve import preserve_state


@dataclass(frozen=True)
class BlockSummary:
    """One block: FLOPs of its branch, 2 for each multiply-add."""

    name: str
    kind: str
    """The name of its class."""
    survival: float
    parameters: int
    """Of its branch."""
    forward: int
    backward: int


@dataclass(frozen=True)
class Summary:
    """A model block by block; printed, it is a table."""

    blocks: tuple[BlockSummary, ...]
    forward: int
    """FLOPs of one forward pass at full depth, on the example."""
    backward: int

    @property
    def expected_depth(self) -> float:
        """Sum of p_l."""
        return sum(block.survival for block in self.blocks)

    @property
    def expected_saving(self) -> float:
        """The share of a training step's FLOPs, from 0 to 1, that is not spent.

        A block costs its branch with probability p_l, and nothing else depends on the gates.
        """
        saved = sum((1 - b.survival) * (b.forward + b.backward) for b in self.blocks)
        return saved / (self.forward + self.backward)

    def __str__(self) -> str:
        head = ("block", "class", "p", "parameters", "forward", "backward")
        rows = [
            (b.name, b.kind, f"{b.survival:.3f}", si(b.parameters), si(b.forward), si(b.backward))
            for b in self.blocks
        ]
        total = f"{si(self.forward)} forward, {si(self.backward)} backward at full depth"
        return "\n".join(
            [
                plain_table(head, rows, left=2),
                f"expected depth {self.expected_depth:.4g} of {len(self.blocks)} blocks; FLOPs "
                f"{total}; {100 * self.expected_saving:.1f} % saved",
            ]
        )


def summary(model: nn.Module, example: Example) -> Summary:
    """Cost and expected saving of every block of a model that has stochastic depth.

    Each block is closed in turn, and the FLOPs that disappear are its own. Blocks that look the
    same (class, configuration, shapes of the input) are counted once.

    Args:
        example: inputs of one forward call.

    Raises:
        ApplyError: when `model` is not one that `sd.apply` was given.
    """
    handle = handle_of(model)
    run = caller(model, example)
    before = [block.gates[0].evaluation for block in handle.blocks]
    try:
        with preserve_state(model), torch.enable_grad():
            model.eval()
            _set(handle.blocks, Gate())
            shapes = _input_shapes(model, handle.blocks, run)
            forward, backward = _count(run)
            counted: dict[tuple[str, str], tuple[int, int]] = {}
            summaries = []
            for block, p in zip(handle.blocks, handle.survival, strict=True):
                module = model.get_submodule(block.name)
                look = (repr(module), f"{shapes.get(block.name)} of {len(block.gates)} gates")
                if look not in counted:
                    _set([block], Gate(open=False))
                    without = _count(run)
                    counted[look] = forward - without[0], backward - without[1]
                    _set([block], Gate())
                size = sum(model.get_parameter(name).numel() for name in block.parameters)
                kind = type(module).__name__
                summaries.append(BlockSummary(block.name, kind, p, size, *counted[look]))
    finally:
        for block, gate in zip(handle.blocks, before, strict=True):
            _set([block], gate)
    return Summary(tuple(summaries), forward, backward)


def _set(blocks: list[Block], gate: Gate) -> None:
    for block in blocks:
        for addition in block.gates:
            addition.evaluation = gate


def _count(run: Callable[[], Any]) -> tuple[int, int]:
    """FLOPs of forward and backward."""
    with CountFlops() as forward:
        outputs = [leaf for leaf in tree_leaves(run()) if isinstance(leaf, Tensor)]
    total = torch.stack([out.float().sum() for out in outputs if out.requires_grad]).sum()
    with CountFlops() as backward:
        total.backward()
    return forward.total, backward.total


def _input_shapes(model: nn.Module, blocks: list[Block], run: Callable[[], Any]) -> dict[str, str]:
    shapes: dict[str, str] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            leaves = tree_leaves((args, kwargs))
            shapes[name] = str([tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)])

        return hook

    handles = [
        model.get_submodule(block.name).register_forward_pre_hook(
            note(block.name), with_kwargs=True
        )
        for block in blocks
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return shapes
