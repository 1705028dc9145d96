"""`sd.summary`: the cost of each block, and what skipping is expected to save."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

import torch
from torch import nn

from stochastic_depth.block import Block, force
from stochastic_depth.choices import Closed, GateKind
from stochastic_depth.gates import CLOSED, OPEN
from stochastic_depth.handle import Handle
from stochastic_depth.plain_text import count_text, plain_table, si
from stochastic_depth.surgery.applied import applied_to, handle_of, owner_of
from stochastic_depth.surgery.blocks import enclosing
from stochastic_depth.surgery.example import Example, caller, sum_of_outputs
from stochastic_depth.surgery.flops import CountFlops
from stochastic_depth.surgery.gated_class import fingerprint
from stochastic_depth.surgery.model_state import preserve_state
from stochastic_depth.survival import StepDependent
from stochastic_depth.tensors import tensors_in
from stochastic_depth.torch_private import uncompiled


@dataclass(frozen=True, kw_only=True)
class BlockSummary:
    """One block, and the FLOPs of its branch, counted as 2 per multiply-add."""

    name: str
    kind: str
    """The name of its class."""
    survival: float
    parameters: int
    """The number of parameters of its branch."""
    forward: int
    """FLOPs of the forward pass."""
    backward: int
    """FLOPs of the backward pass."""
    inside: tuple[int, ...] = ()
    """Positions of the blocks that have it in their branch; it runs only while they are open."""


SHALLOW = 20
"""A network with fewer blocks counts as shallow."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The cost of a model, block by block; printed, it is a table."""

    blocks: tuple[BlockSummary, ...]
    forward: int
    """FLOPs of one forward pass at full depth, on the example."""
    backward: int
    """FLOPs of its backward pass."""
    closed: Closed = "skipped"
    """What a closed block saves."""
    gate: GateKind = "batch"
    """How gates are drawn: one for the mini-batch or one for each sample; masks ("sample") save
    nothing."""
    gating: str = ""
    """How gates are drawn, where this differs from the paper; and the schedule of the drop
    rates."""
    uncounted: Mapping[str, int] = field(default_factory=dict)
    """The number of calls, by operator, whose FLOPs are in none of the counts: those of a forward
    and backward pass at full depth. Recurrent layers (`nn.LSTM`) are among them."""

    @property
    def advice(self) -> str:
        """A warning if the network is too shallow for its drop rates; empty otherwise.

        Among networks of 9 to 54 blocks, those with fewer than 20 lost accuracy at p_L below 0.7
        (EXPERIMENTS.md, digits over depth; ResNet-32 on CIFAR-10).
        """
        lowest = min((block.survival for block in self.blocks), default=1.0)
        if len(self.blocks) >= SHALLOW or lowest >= 0.7 or self.closed == "forward-only":
            return ""
        return (
            f"with {len(self.blocks)} blocks each is a large part of the network, and a survival "
            f"probability of {lowest:.2g} has cost such networks accuracy: 0.8 or more is advised"
        )

    @property
    def expected_depth(self) -> float:
        """Sum of p_l."""
        return sum(block.survival for block in self.blocks)

    @property
    def expected_saving(self) -> float:
        """The expected share of a training step's FLOPs, from 0 to 1, that is saved.

        A block costs its branch with probability p_l, if the blocks around it are open. Nothing
        else depends on the gates.
        """
        return self.saving([block.survival for block in self.blocks])

    def saving(self, open_shares: Sequence[float]) -> float:
        """The share that is saved if block l is open in the share `open_shares[l - 1]` of steps.

        Given the gates of one step, each True or False, it is what that step saves.
        """
        if self.gate == "sample":
            return 0.0
        saved = sum(
            math.prod(open_shares[outer] for outer in b.inside)
            * (1 - share)
            * (b.backward + (b.forward if self.closed == "skipped" else 0))
            for b, share in zip(self.blocks, open_shares, strict=True)
        )
        whole = self.forward + self.backward
        return saved / whole if whole else 0.0

    def __str__(self) -> str:
        head = ("block", "class", "p", "parameters", "forward", "backward")
        rows = [
            (b.name, b.kind, f"{b.survival:.3f}", si(b.parameters), si(b.forward), si(b.backward))
            for b in self.blocks
        ]
        full = f"{si(self.forward)} forward, {si(self.backward)} backward at full depth"
        calls = [
            f"{operator} ({count_text(count, 'call')})"
            for operator, count in self.uncounted.items()
        ]
        uncounted = f"not counted: the FLOPs of {', '.join(calls)}" if calls else ""
        return "\n".join(
            [
                plain_table(head, rows, left=2),
                f"expected depth {self.expected_depth:.4g} of {len(self.blocks)} blocks; FLOPs "
                f"{full}; {100 * self.expected_saving:.1f} % saved",
                *wrap(uncounted, 96),
                *wrap(self.gating, 96),
                *wrap(self.advice, 96),
            ]
        )


@uncompiled()
def summary(model: nn.Module, example: Example) -> Summary:
    """Cost and expected saving of every block of a model that has stochastic depth.

    Each block is closed in turn, and the FLOPs that disappear are counted as its own. Blocks that
    look the same (class, configuration, branch, and shapes and gradients of the inputs) are counted
    once.

    Args:
        example: inputs of one forward call.

    Raises:
        ApplyError: when `sd.apply` was not called on `model`.

    Examples:
        >>> model = sd.models.CifarResNet(8)
        >>> handle = sd.apply(model)
        >>> print(sd.summary(model, torch.randn(1, 3, 32, 32)))
        block     class         p  parameters  forward  backward
        blocks.0  Residual  0.833      4.67 k   9.44 M    18.9 M
        blocks.1  Residual  0.667        14 k   7.08 M    14.2 M
        blocks.2  Residual  0.500      55.6 k   7.08 M    14.2 M
        expected depth 2 of 3 blocks; FLOPs 24.5 M forward, 48.1 M backward at full depth; ...
        ...
    """
    handle = handle_of(model)
    rule = handle.probabilities  # at the full drop rates, or in the last step
    survival = handle.survival if isinstance(rule, StepDependent) else rule.full
    opened = force(handle.blocks, OPEN)
    found = applied_to(model).found
    training = any(block.training_only for block in found)
    # Calling only the forward method runs no hooks, which would draw gates in training mode.
    run = caller(owner_of(model).forward if training else model, example)
    with preserve_state(model), torch.enable_grad(), opened:
        model.train(training)
        inputs = _inputs(handle.blocks, run)
        forward, backward, uncounted = _count(run)
        counted: dict[tuple[str, ...], tuple[int, int]] = {}
        summaries = []
        around = enclosing(found)
        for block, as_found, p, inside in zip(handle.blocks, found, survival, around, strict=True):
            module, names = block.module, [*as_found.modules.elements(), *as_found.parameters]
            in_branch = sorted(name.removeprefix(block.name) for name in names)
            alike = fingerprint(module), inputs.get(block.name, block.name), str(in_branch)
            if alike not in counted:
                with force([block], CLOSED):
                    forward_without, backward_without, _ = _count(run)
                counted[alike] = forward - forward_without, backward - backward_without
            branch_forward, branch_backward = counted[alike]
            owned = (parameter for each in block.owned for parameter in each.parameters())
            summaries.append(
                BlockSummary(
                    name=block.name,
                    kind=type(module).__name__,
                    survival=p,
                    parameters=sum(parameter.numel() for parameter in owned),
                    forward=branch_forward,
                    backward=branch_backward,
                    inside=inside,
                )
            )
    return Summary(
        blocks=tuple(summaries),
        forward=forward,
        backward=backward,
        closed=handle.settings.closed,
        gate=handle.gate,
        gating=_gating(handle),
        uncounted=dict(uncounted),
    )


def _gating(handle: Handle) -> str:
    parts = [f"gates: {'balanced, ' if handle.settings.balance else ''}one coin a {handle.gate}"]
    if handle.gate == "sample":
        parts[0] += ", whose branches run on all samples"
    if handle.gate == "subset":
        parts = [f"gates: {'balanced ' if handle.settings.balance else ''}subsets of the samples"]
    if parts == ["gates: one coin a batch"]:
        parts = []
    if handle.settings.closed == "forward-only":
        parts.append("closed branches run forward only")
    schedule = handle.probabilities.to_json()["schedule"]
    if schedule is not None:
        values = ", ".join(f"{k}={v}" for k, v in schedule.items() if k != "name")
        parts.append(f"schedule: {schedule['name']}({values})")
    return "; ".join(parts)


def _count(run: Callable[[], Any]) -> tuple[int, int, Counter[str]]:
    """FLOPs of the forward and of the backward pass, and the calls that could not be counted."""
    with CountFlops() as forward:
        output = run()
    loss = sum_of_outputs(output)
    with CountFlops() as backward:
        if loss is not None:  # something is trained
            loss.backward()
    return forward.total, backward.total, forward.uncounted + backward.uncounted


def _inputs(blocks: Sequence[Block], run: Callable[[], Any]) -> dict[str, str]:
    """For each block, by name, the shapes of its inputs, and which of them need a gradient."""
    inputs: dict[str, str] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = tensors_in((args, kwargs))
            inputs[name] = str([(tuple(tensor.shape), tensor.requires_grad) for tensor in given])

        return hook

    handles = [
        block.module.register_forward_pre_hook(record(block.name), with_kwargs=True)
        for block in blocks
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return inputs
