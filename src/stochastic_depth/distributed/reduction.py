"""Data parallelism that does not send the gradients of closed blocks."""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from stochastic_depth.block import Block
from stochastic_depth.distributed.rank_gates import GateConsistency
from stochastic_depth.errors import ApplyError
from stochastic_depth.gates import Gate
from stochastic_depth.handle import Handle
from stochastic_depth.surgery.applied import applied_inside, handle_of
from stochastic_depth.torch_private import Replicated, in_ddp_forward, uses_replicate


def skip_closed(ddp: nn.Module) -> None:
    """Send only the gradients of open blocks, by a communication hook on `ddp`.

    `ddp` is a `DistributedDataParallel`, or a model under the composable `replicate`.

    Every rank has the same gates, so all ranks leave out the same gradients. The other gradients
    are sent during the backward pass, as usual. With gradient accumulation (`ddp.no_sync()`), the
    gradients of a block are sent when it was open in any of the forward passes. With gates for
    single samples, with per-rank gates, and after `sd.remove`, every gradient is sent.

    What adds parameters to the model or wraps its modules, such as LoRA, must have done so before
    `ddp` was created.

    Raises:
        ApplyError: when `ddp` is neither, or contains no stochastic depth.
        GateError: in a backward pass, on every rank, when ranks have different gates. On a GPU this
            is checked in every hundredth backward pass.
    """
    if isinstance(ddp, DistributedDataParallel):
        model, group = ddp.module, ddp.process_group
    elif isinstance(ddp, Replicated):
        model, group = ddp, None
    else:
        raise ApplyError(
            f"{type(ddp).__name__} is neither a DistributedDataParallel nor under replicate: call "
            "skip_closed(DistributedDataParallel(model))"
        )
    applied = applied_inside(model)
    if not applied:
        raise ApplyError(
            f"{type(model).__name__} has no stochastic depth: sd.apply(model) first, then "
            "DistributedDataParallel(model)"
        )
    blocks = [_Blocks(model, inner) for inner in applied.values()]
    ddp.register_comm_hook(_Reduction(blocks, group), _Reduction.reduce)


class _Blocks:
    """The blocks of one model: their parameters, and which blocks were closed."""

    def __init__(self, whole: nn.Module, model: nn.Module) -> None:
        self.handle: Handle = handle_of(model)
        self._whole = whole
        self._closed: set[int] | None = None
        """The blocks that were closed in every forward pass since the last reduction; None if no
        pass was noted, as after `sd.remove`, and then none counts as closed."""
        self._owners = _owners(whole, model, self.handle.blocks)
        self.handle.observers.append(self._note)

    def _note(self, gates: list[Gate] | None) -> None:
        """Note which branches learn in a forward pass that begins; `gates` is None in evaluation.

        A block of which a part is in evaluation mode runs whatever its gate is. A pass that is no
        forward pass of DDP may be made on one rank alone: it is noted only if it learns.
        """
        in_ddp = in_ddp_forward() or uses_replicate(self._whole)
        with_graph = torch.is_grad_enabled()  # not in the first pass of a reentrant checkpoint
        if not (in_ddp or with_graph) or (gates is None and not (in_ddp and with_graph)):
            return
        closed = set[int]()
        if gates is not None and not self.handle.differs_by_rank:
            for number, (block, gate) in enumerate(zip(self.handle.blocks, gates, strict=True)):
                if not gate.learns and all(module.training for module in block.gate_readers):
                    closed.add(number)
        self._closed = closed if self._closed is None else self._closed & closed

    def forget(self) -> None:
        self._closed = None

    def closed(self, parameter: Tensor) -> bool:
        """Whether `parameter` belongs only to blocks that were closed in every forward pass."""
        owners = self._owners.get(parameter)
        return bool(owners and self._closed and self._closed.issuperset(owners))


def used_outside(whole: nn.Module, model: nn.Module, blocks: Sequence[Block]) -> set[Tensor]:
    """The parameters that modules outside of the branches have.

    Modules and parameters are compared by identity, because wrapping a model changes names. Inside
    of `model` a module of a branch is used by branches only, as `sd.apply` has found. But a module
    around `model` that has it too, or its parameters, may use them whatever the gates are.

    Args:
        whole: the model that contains `model`, or `model` itself.
        model: the model that `sd.apply` was called on.
        blocks: its blocks.
    """
    children = set[nn.Module]()
    single: dict[nn.Module, set[Tensor]] = {}
    for each in chain.from_iterable(block.owned for block in blocks):
        if (child := each.owner._modules.get(each.name)) is not None:
            children.add(child)
            continue
        parametrizations = each.owner._modules.get("parametrizations") or nn.Module()
        for module in (each.owner, *parametrizations.modules()):
            single.setdefault(module, set()).update(each.parameters())
    outside = set[Tensor | None]()
    for _, module in whole.named_modules(memo={model}):  # it is not entered
        outside.update(module._parameters.values())
    for _, module in model.named_modules(memo=children):
        outside.update({*module._parameters.values()} - single.get(module, set()))
    return {parameter for parameter in outside if parameter is not None}


def _owners(whole: nn.Module, model: nn.Module, blocks: Sequence[Block]) -> dict[Tensor, list[int]]:
    """For each trained parameter that only blocks use, the numbers of these blocks."""
    owners: dict[Tensor, list[int]] = {}
    for number, block in enumerate(blocks):
        for parameter in block.trained():
            owners.setdefault(parameter, []).append(number)
    for parameter in used_outside(whole, model, blocks):
        owners.pop(parameter, None)
    return owners


class _Reduction:
    """Averages all gradients over the ranks, except those of closed blocks."""

    def __init__(self, blocks: list[_Blocks], group: dist.ProcessGroup | None) -> None:
        self._blocks, self._group = blocks, group
        self._consistency = GateConsistency([each.handle for each in blocks], group)

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        buffer = bucket.buffer()
        if bucket.index() == 0:
            self._consistency.check(buffer.device)
        runs = list(self._open_runs(bucket))
        if bucket.is_last():
            for blocks in self._blocks:
                blocks.forget()
        if not runs:
            nothing: Future[Tensor] = Future()
            nothing.set_result(buffer)
            return nothing
        parts = [buffer[run] for run in runs]
        sent = parts[0] if len(parts) == 1 else torch.cat(parts)
        sent.div_(dist.get_world_size(self._group))
        work = dist.all_reduce(sent, group=self._group, async_op=True)
        assert work is not None

        def put_back(future: Future[list[Tensor]]) -> Tensor:
            if len(parts) > 1:
                received = future.value()[0].split([len(part) for part in parts])
                for part, average in zip(parts, received, strict=True):
                    part.copy_(average)
            return buffer

        return work.get_future().then(put_back)

    def _open_runs(self, bucket: GradBucket) -> Iterator[slice]:
        """The ranges of a bucket between the gradients of closed blocks."""
        start = end = 0
        for parameter in bucket.parameters():
            size = parameter.numel()
            if any(blocks.closed(parameter) for blocks in self._blocks):
                if end > start:
                    yield slice(start, end)
                start = end + size
            end += size
        if end > start:
            yield slice(start, end)
