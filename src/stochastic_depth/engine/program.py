"""One training step of a CIFAR ResNet, written out: no autograd between blocks, nothing allocated.

    stem -> x[0] -> block 0 -> x[1] -> ... -> block L-1 -> x[L] -> head

`x` are static buffers. A skipped block does nothing: whoever needs its output where it belongs gets
a copy, one for a whole run of skipped blocks. The gradient flows back through one buffer for each
resolution, in which a skipped block leaves it as it is. So each piece works on fixed addresses,
whatever the gates, and can be captured as a CUDA graph of its own.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth.depth import StochasticDepth
from stochastic_depth.engine.flat import FlatParameters, FlatSGD
from stochastic_depth.engine.kernels import BatchNorm, Kernels, Layer, ReferenceKernels
from stochastic_depth.engine.replay import Eagerly, Replay
from stochastic_depth.errors import EngineError
from stochastic_depth.models import CifarResNet
from stochastic_depth.models.cifar_resnet import PoolAndPad
from stochastic_depth.residual import Residual


def layer_of(conv: nn.Conv2d, norm: nn.BatchNorm2d, flat: FlatParameters) -> Layer:
    """What kernels need of a convolution and its batch normalisation."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    return Layer(
        flat.of(conv.weight, flat.working),
        flat.of(conv.weight, flat.gradients),
        conv.stride[0],
        BatchNorm(
            norm.weight.detach(),
            norm.bias.detach(),
            flat.of(norm.weight, flat.gradients),
            flat.of(norm.bias, flat.gradients),
            norm.running_mean,
            norm.running_var,
            norm.momentum,
            norm.eps,
        ),
    )


class Stem:
    """images -> x"""

    def __init__(
        self, layer: Layer, images: Tensor, x: Tensor, gradient: Tensor, kernels: Kernels
    ) -> None:
        self.layer, self.images, self.x, self.gradient = layer, images, x, gradient
        self.kernels = kernels
        self.saved: tuple[Tensor, ...] = ()

    def forward(self) -> None:
        self.saved = self.kernels.stem(self.images, self.layer, self.x)

    def backward(self) -> None:
        self.kernels.stem_backward(self.saved, self.images, self.layer, self.x, self.gradient)


class Block:
    """x -> ReLU(shortcut(x) + branch(x)): two layers around an identity, or pooling and padding."""

    def __init__(
        self,
        first: Layer,
        second: Layer,
        x: Tensor,
        out: Tensor,
        gradient: Tensor,
        gradient_out: Tensor,
        kernels: Kernels,
        keeps: bool,
    ) -> None:
        self.layers = first, second
        self.x, self.out = x, out
        self.gradient, self.gradient_out = gradient, gradient_out
        self.is_transition = x.shape != out.shape
        self.kernels, self._keeps = kernels, keeps
        self.saved: tuple[Tensor, ...] = ()
        self.kept = 0
        """Bytes of what an open block keeps for its backward pass, besides x and out."""

    def forward(self) -> None:
        self.saved = self.kernels.branch(self.x, *self.layers, self._shortcut(), self.out)
        self.kept = self.kept or sum(tensor.nbytes for tensor in self.saved)

    def backward(self) -> None:
        self.kernels.branch_backward(
            self.saved, self.x, *self.layers, self.out, self.gradient_out, self._of_shortcut
        )
        if not self._keeps:
            self.saved = ()

    def skip_forward(self) -> None:
        """Of a transition: the shortcut. Its ReLU is the identity, as x has come from one."""
        self.out.copy_(self._shortcut())

    def skip_backward(self) -> None:
        """Of a transition: back through average pooling and padding."""
        self._of_shortcut()

    def _shortcut(self) -> Tensor:
        if not self.is_transition:
            return self.x
        added = self.out.shape[1] - self.x.shape[1]
        return F.pad(F.avg_pool2d(self.x, 2), (0, 0, 0, 0, 0, added))

    def _of_shortcut(self) -> Tensor:
        if self.is_transition:
            channels = self.x.shape[1]
            spread = F.interpolate(self.gradient_out[:, :channels], scale_factor=2, mode="nearest")
            torch.mul(spread, 0.25, out=self.gradient)
        return self.gradient


class Head:
    """x -> loss, by autograd."""

    def __init__(
        self,
        module: nn.Linear,
        labels: Tensor,
        x: Tensor,
        gradient: Tensor,
        flat: FlatParameters,
        autocasts: bool,
    ) -> None:
        self.module, self.labels, self.x, self.gradient = module, labels, x, gradient
        self.parameters = list(module.parameters())
        self.gradients = [flat.of(p, flat.gradients) for p in self.parameters]
        self.loss = torch.zeros((), dtype=flat.values.dtype, device=x.device)
        self._autocasts = autocasts

    def forward_and_backward(self) -> None:
        x = self.x.detach().requires_grad_()
        autocast = torch.autocast(
            x.device.type, torch.bfloat16, enabled=self._autocasts, cache_enabled=False
        )
        with torch.enable_grad(), autocast:
            loss = F.cross_entropy(self.module(x.mean((2, 3))), self.labels)
        gradients = torch.autograd.grad(loss, [x, *self.parameters])
        self.loss.copy_(loss.detach())
        for place, gradient in zip([self.gradient, *self.gradients], gradients, strict=True):
            place.copy_(gradient)


class Program:
    """The training step of `model` on mini-batches of one shape.

    The parameters of `model` and the momentum of `optimizer` become views of flat buffers; both go
    on working as before, and may be used between steps: for evaluation, checkpoints, or a step of
    autograd on a mini-batch of another size.

    Args:
        model: in training mode, with `depth` applied or none.
        optimizer: of all parameters, in one group.
        shape: of the images, [batch, channels, height, width].
        dtype: of images and activations; other than the parameters' it means autocast.
        kernels: the arithmetic; PyTorch's operators if not given.
        replay: how pieces are run again; eagerly if not given.

    Raises:
        EngineError: when the model, its gates or the optimizer are others than it was written for.
    """

    def __init__(
        self,
        model: nn.Module,
        depth: StochasticDepth | None,
        optimizer: torch.optim.SGD,
        shape: Sequence[int],
        dtype: torch.dtype,
        kernels: Kernels | None = None,
        replay: Replay | None = None,
    ) -> None:
        model = supported(model, depth, optimizer)
        self.depth = depth
        kernels, replay = kernels or ReferenceKernels(), replay or Eagerly()
        units = [unit for unit in model.blocks if isinstance(unit, Residual)]
        self.flat = flat = FlatParameters([model.stem, *units, model.head], dtype)
        self.update = FlatSGD(flat, optimizer)
        self.stem_gradient = flat.of(model.stem[0].weight, flat.gradients)  # type: ignore[arg-type]
        device = flat.values.device
        self.factors = torch.ones(len(units), dtype=flat.values.dtype, device=device)

        def images(channels: int, size: Sequence[int]) -> Tensor:
            empty = torch.zeros(shape[0], channels, *size, dtype=dtype, device=device)
            return empty.contiguous(memory_format=torch.channels_last)

        size = list(shape[2:])
        self.images, self.labels = (
            images(shape[1], size),
            torch.zeros(shape[0], dtype=torch.int64, device=device),
        )
        self.x = [images(model.stem[0].out_channels, size)]  # type: ignore[arg-type]
        self.gradients = [torch.zeros_like(self.x[0])]
        for unit in units:
            added = unit.shortcut.added if isinstance(unit.shortcut, PoolAndPad) else 0
            size = [side // 2 for side in size] if added else size
            self.x.append(images(self.x[-1].shape[1] + added, size))
            last = self.gradients[-1]
            self.gradients.append(torch.zeros_like(self.x[-1]) if added else last)

        stem = layer_of(model.stem[0], model.stem[1], flat)  # type: ignore[arg-type]
        self.stem = Stem(stem, self.images, self.x[0], self.gradients[0], kernels)
        self.blocks: list[Block] = []
        streams = zip(pairwise(self.x), pairwise(self.gradients), strict=True)
        for unit, (x, gradients) in zip(units, streams, strict=True):
            conv1, norm1, _, conv2, norm2 = unit.branch  # type: ignore[misc]
            layers = layer_of(conv1, norm1, flat), layer_of(conv2, norm2, flat)
            if depth is not None and depth.scale == "training":
                layers[1].norm.factor = self.factors[len(self.blocks)]
            self.blocks.append(Block(*layers, *x, *gradients, kernels, replay.keeps))
        self.head = Head(
            model.head,
            self.labels,
            self.x[-1],
            self.gradients[-1],
            flat,
            autocasts=dtype != flat.values.dtype,
        )
        self.counters = self._join_counters(model)
        self.kept = 0
        """Bytes that waited for the backward pass in the last step."""
        self._record(replay)

    @torch.no_grad()
    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward, backward, update under the next gates; gives the loss, []."""
        is_open = self._draw()
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.flat.cast()
        keeps_moving = self.depth is None or self.depth.skipped == "paper"
        if keeps_moving and not all(is_open):
            self.flat.gradients.zero_()
        self._forward(is_open)
        self.kept = sum(x.nbytes for x in self.x)
        self.kept += sum(block.kept for block, b in zip(self.blocks, is_open, strict=True) if b)
        self._head()
        self._backward(is_open)
        counted = torch.tensor([True, *(b for b in is_open for _ in range(2))])
        self.counters.add_(counted.to(self.counters.device))
        self.update.step([True, *(keeps_moving or b for b in is_open), True])
        return self.head.loss.clone()

    @property
    def block_gradients(self) -> list[Tensor]:
        """Of the first convolution of each block, as the last step left them."""
        return [block.layers[0].weight_gradient for block in self.blocks]

    def _join_counters(self, model: nn.Module) -> Tensor:
        """Make the batch counters of all normalisations parts of one tensor: [1 + 2 blocks]."""
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        counters = torch.stack([n.num_batches_tracked for n in norms])  # type: ignore[arg-type]
        for norm, counter in zip(norms, counters, strict=True):
            norm.num_batches_tracked = counter
        return counters

    def _draw(self) -> list[bool]:
        if self.depth is None:
            return [True] * len(self.blocks)
        self.depth.draw()
        if self.depth.scale == "training":
            self.factors.copy_(1 / torch.tensor(self.depth.survival, dtype=torch.float64))
        return self.depth.gates.tolist()

    def _forward(self, is_open: Sequence[bool]) -> None:
        self._stem_forward()
        at = 0  # the buffer that holds what has been computed so far
        for i, block in enumerate(self.blocks):
            if not is_open[i] and not block.is_transition:
                continue
            if at != i:
                self.x[i].copy_(self.x[at])
            (self._forwards if is_open[i] else self._skip_forwards)[i]()
            at = i + 1
        if at != len(self.blocks):
            self.x[-1].copy_(self.x[at])

    def _backward(self, is_open: Sequence[bool]) -> None:
        for i in reversed(range(len(self.blocks))):
            if is_open[i]:
                self._backwards[i]()
            elif self.blocks[i].is_transition:
                self._skip_backwards[i]()
        self._stem_backward()

    def _record(self, replay: Replay) -> None:
        """In the order in which the pieces run, as graphs that share memory must be captured."""
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
        """Let `replay` run every piece once or more; statistics are put back."""
        layers = [self.stem.layer, *(layer for block in self.blocks for layer in block.layers)]
        changed = [t for y in layers for t in (y.norm.running_mean, y.norm.running_var)]
        before = [tensor.clone() for tensor in changed]

        def everything() -> None:
            self.stem.forward()
            for block in self.blocks:
                block.skip_forward()
                block.forward()
            self.head.forward_and_backward()
            for block in reversed(self.blocks):
                block.skip_backward()
                block.backward()
            self.stem.backward()

        self.flat.cast()
        replay.warm_up(everything)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        self.flat.gradients.zero_()


def supported(
    model: nn.Module, depth: StochasticDepth | None, optimizer: torch.optim.Optimizer
) -> CifarResNet:
    """`model`, if a program can be written for it.

    Raises:
        EngineError: when not, naming what is in the way.
    """
    if not isinstance(model, CifarResNet):
        raise EngineError(
            f"a block program is written for CifarResNet, this is {type(model).__name__}: "
            "use --engine eager or compiled"
        )
    if depth is not None and depth.gate != "batch":
        raise EngineError(
            f'a block program needs gate="batch", this is "{depth.gate}": use --engine eager'
        )
    if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) != 1:
        raise EngineError(
            f"a block program updates by torch.optim.SGD with one group of parameters, this is "
            f"{type(optimizer).__name__} with {len(optimizer.param_groups)}: use --engine eager"
        )
    return model
