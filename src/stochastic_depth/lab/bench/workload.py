"""Training steps on random inputs, for timing, and the memory they need."""

import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth.handle import Handle
from stochastic_depth.models import CifarResNet
from stochastic_depth.randomness import generator
from stochastic_depth.surgery import apply
from stochastic_depth.survival import Survival
from stochastic_depth.train.build import build_optimizer, first_convolution
from stochastic_depth.train.config import OptimizerConfig
from stochastic_depth.train.engines import ProgramEngine, build_engine
from stochastic_depth.train.runtime import Runtime

Step = Callable[[], Tensor]
"""One training step; returns its loss."""


@dataclass(frozen=True)
class Workload:
    """Random images and labels of one mini-batch, and the runtime that computes."""

    batch: int
    size: int
    """Height and width of the images."""
    channels: int
    runtime: Runtime

    def step(self, model: nn.Module, tutorial: bool = False) -> Step:
        """A training step of `model`: forward, backward, SGD.

        Args:
            tutorial: in float32 and PyTorch's default memory format, whatever `runtime` says.
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
    ) -> "EngineStep":
        """A training step of `model` as `train` takes it: by the engine of `runtime`.

        Args:
            survival: of its blocks; constant depth if not given.
            gates: those of every step; drawn if not given.
        """
        handle = None if survival is None else apply(model, survival)
        labels = torch.arange(self.batch) % 10
        step = EngineStep(model, handle, self.images(), labels, self.runtime)
        if handle is not None and gates is not None:
            step.forced.enter_context(handle.forced(gates))
        return step

    def images(self) -> Tensor:
        """Random ones: float32 [batch, channels, size, size], always the same."""
        shape = self.batch, self.channels, self.size, self.size
        return torch.randn(shape, generator=generator("bench"))


class EngineStep:
    """The training step that `train` takes."""

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
        """Gates that are forced as long as there is this step."""
        model.to(device=runtime.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        images = images.contiguous(memory_format=torch.channels_last).to(runtime.device)
        self._batch = images, labels.to(runtime.device)
        self._runtime = runtime
        self.engine = build_engine(
            model,
            handle,
            build_optimizer(OptimizerConfig(), model),
            first_convolution(model),
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
    """Forward, backward, SGD with the cross-entropy of logits [..., classes] and labels [...].

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
        self.tensor = tensor.detach()  # or a result that is saved would hold its own graph
        self.counts = not isinstance(whole, nn.Parameter)
        self.storage = whole.untyped_storage()


def saved_for_backward(step: Step) -> int:
    """Bytes of all tensors kept for the backward pass when it begins, without parameters.

    Of a step without one: those that wait when it ends.
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
        result = step()  # which keeps its graph
    if isinstance(step, EngineStep) and isinstance(step.engine, ProgramEngine):
        return step.engine.kept  # autograd sees its head alone
    waiting = found[0] if found else total()
    del result
    return waiting


def step_memory(step: Step, device: str, steps: int = 5) -> float:
    """Bytes that a training step takes beyond what is there before it: the mean of a few.

    On a GPU the peak of all that was allocated. Elsewhere `saved_for_backward`, which is most of
    it: PyTorch does not report the peak there.
    """
    if torch.device(device).type != "cuda":
        return statistics.fmean(saved_for_backward(step) for _ in range(steps))
    peaks = []
    for _ in range(steps):
        with allocator_peak(device) as peak:
            step()
        peaks.append(peak())
    return statistics.fmean(peaks)


@contextmanager
def allocator_peak(device: str) -> Iterator[Callable[[], int]]:
    """Gives a function that returns, on leaving, the most bytes allocated on a GPU inside.

    What was allocated before does not count.
    """
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before


class PlainBlock(nn.Module):
    """A residual unit; `drop` is what a library puts after the branch."""

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
    """[batch, channels, height, width] -> logits [batch, 10]: the arithmetic of `CifarResNet`.

    Args:
        drops: what comes after each branch; nothing if not given.
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


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the parameters of `source`, in order."""
    with torch.no_grad():
        for p, q in zip(target.parameters(), source.parameters(), strict=True):
            p.copy_(q)
