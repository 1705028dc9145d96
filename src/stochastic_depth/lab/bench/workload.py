"""Training steps on random inputs, for timing, and the memory that they need."""

import itertools
import statistics
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth.handle import Handle
from stochastic_depth.models import CifarResNet
from stochastic_depth.models.published import published
from stochastic_depth.randomness import generator
from stochastic_depth.surgery import apply
from stochastic_depth.survival import Survival
from stochastic_depth.train.build import build_optimizer
from stochastic_depth.train.config import OptimizerConfig
from stochastic_depth.train.engines import ProgramEngine, build_engine
from stochastic_depth.train.runtime import Runtime

Step = Callable[[], Tensor]
"""One training step; returns its loss."""


@dataclass(frozen=True)
class Workload:
    """The shape of random images of one mini-batch, and the runtime that computes."""

    batch: int
    size: int
    """The height and width of the images, in pixels."""
    channels: int
    runtime: Runtime

    def step(self, model: nn.Module, tutorial: bool = False) -> Step:
        """A training step of `model`: forward, backward, SGD.

        Args:
            tutorial: whether to use float32 and PyTorch's default memory format, whatever `runtime`
                says.
        """
        runtime = self.runtime
        if tutorial:
            runtime = Runtime(runtime.device, "float32", runtime.threads)
        layout = torch.contiguous_format if tutorial else torch.channels_last
        labels = torch.arange(self.batch) % 10
        return training_step(model, self.images(), labels, runtime, layout)

    def engine_step(
        self,
        model: CifarResNet,
        survival: Survival | None = None,
        gates: Sequence[bool] | None = None,
        balance: bool = False,
    ) -> "EngineStep":
        """A training step of `model` as `train` takes it, by the engine of `runtime`.

        Args:
            survival: the survival probabilities of its blocks; constant depth when not given.
            gates: the gates of every step; they are drawn when not given.
            balance: whether every step has the expected number of open blocks.
        """
        handle = None if survival is None else apply(model, survival, balance=balance)
        labels = torch.arange(self.batch) % 10
        step = EngineStep(model, handle, self.images(), labels, self.runtime)
        if handle is not None and gates is not None:
            step.forced.enter_context(handle.forced(gates))
        return step

    def images(self) -> Tensor:
        """Random images, always the same: float32 [batch, channels, size, size]."""
        shape = self.batch, self.channels, self.size, self.size
        return torch.randn(shape, generator=generator("bench"))


def active_share(blocks: int, share: float) -> list[bool]:
    """Gates that open `share` of the blocks, spread evenly over the depth."""
    count = [int(share * n) for n in range(blocks + 1)]
    return [after > before for before, after in itertools.pairwise(count)]


class EngineStep:
    """A training step as `train` takes it."""

    def __init__(
        self,
        model: CifarResNet,
        handle: Handle | None,
        images: Tensor,
        labels: Tensor,
        runtime: Runtime,
    ) -> None:
        self.model, self.handle = model, handle
        self.forced = ExitStack()
        """Holds the gates that are forced as long as this step exists."""
        model.to(device=runtime.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        images = images.contiguous(memory_format=torch.channels_last).to(runtime.device)
        self._batch = images, labels.to(runtime.device)
        self._runtime = runtime
        self.engine = build_engine(
            model,
            handle,
            build_optimizer(OptimizerConfig(), model),
            runtime,
            tuple(images.shape),
        )

    def __call__(self) -> Tensor:
        loss = self.engine.step(*self._batch).loss
        self._runtime.synchronise()
        return loss


def training_step(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    runtime: Runtime,
    layout: torch.memory_format = torch.channels_last,
) -> Step:
    """Forward, backward, and SGD with the cross-entropy of logits [..., classes] and labels [...].

    Args:
        layout: the memory format of the weights, and of inputs that are images.
    """
    model.to(device=runtime.device, memory_format=layout)  # pyright: ignore[reportCallIssue]
    inputs, labels = inputs.to(runtime.device), labels.to(runtime.device).flatten()
    if inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=layout)
    optimizer = build_optimizer(OptimizerConfig(), model)

    def step() -> Tensor:
        optimizer.zero_grad()
        with runtime.autocast():
            loss = F.cross_entropy(model(inputs).flatten(0, -2), labels)
        loss.backward()
        optimizer.step()
        runtime.synchronise()
        return loss.detach()

    return step


class _Saved:
    """A tensor that a graph keeps alive."""

    def __init__(self, tensor: Tensor) -> None:
        whole = tensor if tensor._base is None else tensor._base
        self.tensor = tensor.detach()  # otherwise a saved result would hold its own graph
        self.counts = not isinstance(whole, nn.Parameter)
        self.storage = whole.untyped_storage()


def saved_for_backward(step: Step) -> int:
    """Bytes of all tensors that are kept when the backward pass begins, without parameters.

    For a step without a backward pass: the bytes that are kept when it ends.
    """
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()
    found: list[int] = []

    def note(tensor: Tensor) -> _Saved:
        holder = _Saved(tensor)
        saved.add(holder)
        return holder

    def total() -> int:
        storages = [holder.storage for holder in saved if holder.counts]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def give_back(holder: _Saved) -> Tensor:
        if not found:
            found.append(total())
        return holder.tensor

    with torch.autograd.graph.saved_tensors_hooks(note, give_back):
        result = step()  # the result keeps its graph alive
    if isinstance(step, EngineStep) and isinstance(step.engine, ProgramEngine):
        return step.engine.bytes_saved  # autograd sees only its head
    waiting = found[0] if found else total()
    del result
    return waiting


def step_memory(step: Step, device: str, steps: int = 5) -> float:
    """The bytes that a step needs beyond what is allocated before it: the mean of a few steps.

    On a GPU this is the peak of all allocations. Elsewhere it is `saved_for_backward`, which is
    most of it, because PyTorch does not report the peak there.
    """
    if torch.device(device).type != "cuda":
        return statistics.fmean(saved_for_backward(step) for _ in range(steps))
    peaks = []
    for _ in range(steps):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    return statistics.fmean(peaks)


class PlainBlock(nn.Module):
    """A residual unit; `drop` is the module that a library puts after the branch."""

    def __init__(self, channels_in: int, channels: int, drop: nn.Module) -> None:
        super().__init__()
        self.drop = drop
        stride = 1 + (channels != channels_in)
        self.added = channels - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, self.added)) if self.added else x
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(shortcut + self.drop(self.norm2(self.conv2(x))))


class PlainResNet(nn.Module):
    """The arithmetic of `CifarResNet`: [batch, channels, height, width] -> logits [batch, 10].

    Args:
        drops: the modules after each branch; none when not given.
    """

    def __init__(
        self, depth: int, channels: int = 3, drops: Sequence[nn.Module] | None = None
    ) -> None:
        super().__init__()
        n = (depth - 2) // 6
        drops = drops or [nn.Identity() for _ in range(3 * n)]
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [16] * n + [32] * n + [64] * n
        self.blocks = nn.Sequential(*map(PlainBlock, [16, *widths[:-1]], widths, drops))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return self.head(self.blocks(x).mean((2, 3)))


def timm_model(name: str, size: int, **options: Any) -> nn.Module:
    """A network of timm for ten classes of images of `size` pixels, if it has one size.

    Raises:
        ConfigError: when there is no such network.
        MissingExtraError: without timm.
    """
    if name.startswith("vit"):
        options["img_size"] = size
    return published(f"timm/{name}", num_classes=10, **options)[0]


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters of `source` to `target`, in order."""
    with torch.no_grad():
        for p, q in zip(target.parameters(), source.parameters(), strict=True):
            p.copy_(q)
