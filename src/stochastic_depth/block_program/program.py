"""One training step of a CIFAR ResNet, written out: no autograd between blocks.

    stem -> block 0 -> block 1 -> ... -> block L-1 -> head

A skipped block does nothing: the next block reads the output of the last open one. The gradient
flows back through one buffer for each resolution, which a skipped block leaves unchanged.

How outputs get from block to block depends on the `Replay`:

- Usually (`Eagerly`), a block that runs takes a free buffer for its output, which the next one
  reads in place, and which is given back after the block's backward pass.
- If it is fixed (`CudaGraphs`, which repeat work on the addresses of its capture), each block has a
  buffer for its input, into which the block before it writes. After skipped blocks, the input is a
  copy of what the last open one has written.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from stochastic_depth.block_program.kernels import Kernels
from stochastic_depth.block_program.memory import Buffers, FlatParameters, FlatSGD
from stochastic_depth.block_program.pieces import (
    BlockPiece,
    Eagerly,
    Head,
    Replay,
    Stem,
    layer_of,
    linear_of,
)
from stochastic_depth.choices import Closed, GateKind
from stochastic_depth.errors import EngineError
from stochastic_depth.handle import Handle
from stochastic_depth.models import CifarResNet
from stochastic_depth.models.resnet import PoolAndPad
from stochastic_depth.residual import Residual
from stochastic_depth.torch_private import zero


class Program:
    """The training step of `model` on mini-batches of one shape.

    The parameters of `model` and the momentum of `optimizer` become views of flat buffers. Both
    work as before, and may be used between steps: for evaluation, checkpoints, or a step of
    autograd on a mini-batch of a different size.

    Args:
        model: the network, in training mode.
        handle: the handle of `model`; None for constant depth.
        optimizer: the optimizer of all parameters, in one group.
        shape: the shape of the images, [batch, channels, height, width].
        dtype: the type of images and activations; if it differs from the type of the parameters,
            the step computes as autocast does, except for the last layer, which is in float32.
        kernels: the arithmetic; PyTorch's operators if not given.
        replay: how pieces are repeated; eagerly if not given.

    Raises:
        EngineError: when it does not support the model, its gates or the optimizer; or when a
            parameter is frozen, or not one of the optimizer's.
    """

    def __init__(
        self,
        model: nn.Module,
        handle: Handle | None,
        optimizer: torch.optim.SGD,
        shape: Sequence[int],
        dtype: torch.dtype,
        kernels: Kernels | None = None,
        replay: Replay | None = None,
    ) -> None:
        model = _require_supported(model, handle, optimizer)
        self.handle = handle
        kernels, replay = kernels or Kernels(), replay or Eagerly()
        units = [unit for unit in model.blocks if isinstance(unit, Residual)]
        self.flat = flat = FlatParameters([model.stem, *units, model.head], dtype)
        self.update = FlatSGD(flat, optimizer)
        self.stem_gradient = flat.view(model.stem[0].weight, flat.gradients)  # type: ignore[arg-type]
        device = flat.values.device
        self.factors = torch.ones(len(units), dtype=flat.values.dtype, device=device)
        self.images = _zeros(shape, dtype, device)
        self.labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self.gradients = _gradients(model, units, self.images)
        self._is_fixed, self.buffers = replay.is_fixed, Buffers()
        # The outputs of the stem and the blocks. If addresses are not fixed, blocks take buffers
        # of these shapes in every step.
        x = [
            torch.empty_like(g) if i == 0 or self._is_fixed else g
            for i, g in enumerate(self.gradients)
        ]
        stem = layer_of(model.stem[0], model.stem[1], flat)  # type: ignore[arg-type]
        self.stem = Stem(stem, self.images, x[0], self.gradients[0], kernels)
        self.blocks: list[BlockPiece] = []
        streams = zip(pairwise(x), pairwise(self.gradients), strict=True)
        for unit, (x_and_out, gradients) in zip(units, streams, strict=True):
            conv1, norm1, _, conv2, norm2 = unit.branch  # type: ignore[misc]
            layers = layer_of(conv1, norm1, flat), layer_of(conv2, norm2, flat)
            if handle is not None and handle.scale == "training":
                layers[1].norm.factor = self.factors[len(self.blocks)]
            piece = BlockPiece(*layers, *x_and_out, *gradients, kernels, self._is_fixed)
            self.blocks.append(piece)
        head = linear_of(model.head, flat)
        self.head = Head(head, self.labels, x[-1], self.gradients[-1], kernels)
        self.norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        self.counters = _join_counters(self.norms)
        self.bytes_saved = 0
        """Bytes that the last step saved for its backward pass."""
        self._record(replay)

    @torch.no_grad()
    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward, backward and update under the next gates; returns the loss, [].

        Raises:
            EngineError: when a batch normalisation is in evaluation mode, or when a gate multiplies
                its branch by p_l, as gates of evaluation do.
        """
        if not all(norm.training for norm in self.norms):
            raise EngineError(
                "the block program normalises by the statistics of the mini-batch, and a batch "
                "normalisation is in evaluation mode: call model.train(), or use --engine eager"
            )
        is_open = self._draw()
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.flat.cast()
        # Under "paper" a closed block has zero gradients, and is updated by its momentum.
        updates_closed = self.handle is None or self.handle.skipped == "paper"
        if updates_closed:
            self._clear_closed(is_open)
        self._forward(is_open)
        self.bytes_saved = self._count_saved(is_open)
        self._head()
        self._backward(is_open)
        counted = torch.tensor([True, *(b for b in is_open for _ in range(2))])
        self.counters.add_(counted.to(self.counters.device))
        self.update.step([True, *(updates_closed or b for b in is_open), True])
        return self.head.loss.clone()

    @property
    def block_gradients(self) -> list[Tensor]:
        """Gradients of each block's first convolution after the last step."""
        return [block.layers[0].weight_gradient for block in self.blocks]

    def _draw(self) -> list[bool]:
        """Draw the next gates, and return which blocks are open; raises as `step` does."""
        if self.handle is None:
            return [True] * len(self.blocks)
        gates = self.handle.next_gates()
        factors = [gate.factor for gate in gates]
        if self.handle.scale == "training":
            values = [1.0 if factor is None else factor.item() for factor in factors]
            self.factors.copy_(torch.tensor(values, dtype=torch.float64))
        elif any(factor is not None for factor in factors):
            raise EngineError(
                "the block program does not multiply branches by p_l in a training step, as "
                "handle.full_depth() and handle.forced(scaled=True) ask for: use --engine eager"
            )
        return [gate.open for gate in gates]

    def _clear_closed(self, is_open: Sequence[bool]) -> None:
        segments = zip(self.flat.segments[1:-1], is_open, strict=True)
        closed = [self.flat.gradients[segment] for segment, b in segments if not b]
        if closed:
            zero(closed)

    def _forward(self, is_open: Sequence[bool]) -> None:
        self._stem_forward()
        x = self.stem.x
        for i, block in enumerate(self.blocks):
            if not is_open[i] and not block.is_transition:
                continue
            self._read(block, x)
            if not self._is_fixed:
                block.out = self.buffers.take(block.out)
            (self._forwards if is_open[i] else self._skip_forwards)[i]()
            x = block.out
        self._read(self.head, x)

    def _read(self, piece: BlockPiece | Head, x: Tensor) -> None:
        """Make a piece read x: in place, or copied to the fixed address that it reads."""
        if not self._is_fixed:
            piece.x = x
        elif piece.x is not x:
            piece.x.copy_(piece.kernels.materialise(x))

    def _backward(self, is_open: Sequence[bool]) -> None:
        for i, block in reversed(list(enumerate(self.blocks))):
            if not is_open[i] and not block.is_transition:
                continue
            (self._backwards if is_open[i] else self._skip_backwards)[i]()
            if not self._is_fixed:
                self.buffers.give(block.out)
        self._stem_backward()

    def _count_saved(self, is_open: Sequence[bool]) -> int:
        saved = self.stem.x.nbytes
        for block, b in zip(self.blocks, is_open, strict=True):
            written = self._is_fixed or b or block.is_transition
            saved += written * block.out.nbytes + b * block.branch_bytes
        return saved

    def _record(self, replay: Replay) -> None:
        """Make the pieces replayable, in the order in which they run: graphs share memory."""
        blocks = self.blocks
        transitions = [(i, block) for i, block in enumerate(blocks) if block.is_transition]
        with torch.no_grad():
            self._warm_up(replay)
            self._stem_forward = replay(self.stem.forward)
            self._forwards = [replay(block.forward) for block in blocks]
            self._skip_forwards = {i: replay(block.skip_forward) for i, block in transitions}
            self._head = replay(self.head.forward_and_backward)
            self._backwards = [replay(block.backward) for block in reversed(blocks)][::-1]
            self._skip_backwards = {i: replay(block.skip_backward) for i, block in transitions}
            self._stem_backward = replay(self.stem.backward)

    def _warm_up(self, replay: Replay) -> None:
        """Run every piece at least once, then restore the statistics."""
        layers = [self.stem.layer, *(layer for block in self.blocks for layer in block.layers)]
        changed = [t for y in layers for t in (y.norm.running_mean, y.norm.running_var)]
        before = [tensor.clone() for tensor in changed]

        def everything() -> None:
            self.stem.forward()
            for block in self.blocks:
                if block.is_transition:
                    block.skip_forward()
                block.forward()
            self.head.forward_and_backward()
            for block in reversed(self.blocks):
                if block.is_transition:
                    block.skip_backward()
                block.backward()
            self.stem.backward()

        self.flat.cast()
        replay.warm_up(everything)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        self.flat.gradients.zero_()


def _join_counters(norms: Sequence[nn.BatchNorm2d]) -> Tensor:
    """Make the batch counters of all normalisations views of one tensor: [1 + 2 blocks]."""
    counters = torch.stack([n.num_batches_tracked for n in norms])  # type: ignore[arg-type]
    for norm, counter in zip(norms, counters, strict=True):
        norm.num_batches_tracked = counter
    return counters


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Images of zeros, channels_last."""
    zeros = torch.zeros(*shape, dtype=dtype, device=device)
    return zeros.contiguous(memory_format=torch.channels_last)


def _gradients(model: CifarResNet, units: Sequence[Residual], images: Tensor) -> list[Tensor]:
    """The gradients of the outputs of the stem and of each unit: one buffer for each resolution."""
    batch, _, *size = images.shape
    channels: int = model.stem[0].out_channels  # type: ignore[assignment]
    gradients = [_zeros((batch, channels, *size), images.dtype, images.device)]
    for unit in units:
        if isinstance(unit.shortcut, PoolAndPad):
            channels += unit.shortcut.added
            size = [side // 2 for side in size]
            gradients.append(_zeros((batch, channels, *size), images.dtype, images.device))
        else:
            gradients.append(gradients[-1])
    return gradients


def why_unsupported(
    network: type[nn.Module], gate: GateKind = "batch", closed: Closed = "skipped"
) -> str | None:
    """Why the block program cannot train a network with these gates; None if it can."""
    if not issubclass(network, CifarResNet) or network.forward is not CifarResNet.forward:
        return f"the block program is written for CifarResNet, this is {network.__name__}"
    if gate != "batch":
        return f'the block program needs gate="batch", this is gate="{gate}"'
    if closed != "skipped":
        return f'the block program skips closed branches, this is closed="{closed}"'
    return None


def _require_supported(
    model: nn.Module, handle: Handle | None, optimizer: torch.optim.Optimizer
) -> CifarResNet:
    """Return `model` if the block program can train it with these gates and this optimizer.

    Raises:
        EngineError: otherwise, naming the reason.
    """
    if handle is None:
        reason = why_unsupported(type(model))
    else:
        reason = why_unsupported(type(model), handle.gate, handle.settings.closed)
    if reason is not None:
        raise EngineError(f"{reason}: use --engine eager")
    if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) != 1:
        raise EngineError(
            f"the block program updates by torch.optim.SGD with one group of parameters, this is "
            f"{type(optimizer).__name__} with {len(optimizer.param_groups)}: use --engine eager"
        )
    trained = {p for p in optimizer.param_groups[0]["params"] if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter not in trained:
            raise EngineError(
                f"the block program updates every parameter, but {name!r} is frozen, or not one of "
                "the optimizer's: use --engine eager"
            )
    dampening = optimizer.param_groups[0]["dampening"]
    if dampening:
        raise EngineError(
            f"the block program updates by SGD without dampening, this has dampening={dampening}: "
            "use --engine eager"
        )
    assert isinstance(model, CifarResNet)
    return model
