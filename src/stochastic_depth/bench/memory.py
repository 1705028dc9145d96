"""The memory that a training step needs."""

import statistics

import torch
from torch import Tensor, nn

from stochastic_depth.bench.workload import EngineStep, Step
from stochastic_depth.train.engines import Blocks


def saved_for_backward(step: Step) -> int:
    """Bytes of all tensors that a training step keeps for its backward pass, parameters aside."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if not isinstance(whole, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    if isinstance(step, EngineStep) and isinstance(step.engine, Blocks):
        return step.engine.kept  # autograd sees its head alone
    return sum(storages.values())


def step_memory(step: Step, device: str, steps: int = 5) -> float:
    """Bytes that a training step takes beyond what is there before it: the mean of a few.

    On a GPU the peak of all that was allocated. Elsewhere `saved_for_backward`, which is most of
    it: PyTorch does not tell the peak there.
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
