"""What a block costs by the way in which it was made skippable: `python tools/closed_blocks.py`.

Sixteen pre-norm transformer blocks of width 16, attention written out, and a trunk that adds two
branches a layer; float32, on one thread. Printed are the fastest rounds of each, in milliseconds of
processor time a block of one forward pass.
"""

import argparse
import contextlib
import importlib
import time

import torch
from torch import Tensor, nn

import stochastic_depth as sd

WIDTH, HEADS, BLOCKS = 16, 4, 16


class Block(nn.Module):
    """A pre-norm transformer block: five modules, nine functions, a shape that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def attention(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm2(x))


class Trunk(nn.Module):
    """Two branches a layer, each modules from end to end, added by the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2)
            )
            for _ in range(BLOCKS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed_forward in self.layers:
            x = attention(x) + x
            x = feed_forward(x) + x
        return x


def models() -> dict[str, tuple[nn.Module, sd.Handle | None]]:
    """Name -> a model and its handle; None for the original."""
    x = torch.randn(2, 8, WIDTH)
    made: dict[str, tuple[nn.Module, sd.Handle | None]] = {}
    for name in ("original", "rewritten", "deferred", "trunk, original", "trunk, deferred"):
        torch.manual_seed(0)
        kind = Trunk if name.startswith("trunk") else nn.Sequential
        model = kind(*(Block() for _ in range(BLOCKS))) if kind is nn.Sequential else kind()
        if name.endswith("original"):
            made[name] = model, None
            continue
        with all_deferred() if name == "deferred" else contextlib.nullcontext():
            made[name] = model, sd.apply(model, sd.Uniform(0.5), example=x)
    return made


class _All:
    def __contains__(self, name: object) -> bool:
        return True


@contextlib.contextmanager
def all_deferred():
    """While entered, `sd.apply` rewrites nothing."""
    module = importlib.import_module("stochastic_depth.surgery.apply")
    before = module.find_blocks
    module.find_blocks = lambda *args, defer, **kwargs: before(*args, **kwargs, defer=_All())
    try:
        yield
    finally:
        module.find_blocks = before


def fastest(model: nn.Module, rounds: int) -> float:
    """Milliseconds a block of one forward pass."""
    x = torch.randn(2, 8, WIDTH)
    seconds = []
    for _ in range(rounds):
        began = time.thread_time()
        model(x)
        seconds.append(time.thread_time() - began)
    return 1e3 * min(seconds) / BLOCKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{'':18} open, training   closed   open, times p_l")
    for name, (model, handle) in models().items():
        if handle is None:
            print(f"{name:18} {fastest(model, rounds):14.3f}")
            continue
        with handle.forced([True] * BLOCKS):
            as_it_is = fastest(model.train(), rounds)
        with handle.forced([False] * BLOCKS):
            closed = fastest(model.train(), rounds)
        scaled = fastest(model.eval(), rounds)
        print(f"{name:18} {as_it_is:14.3f} {closed:8.3f} {scaled:17.3f}")


if __name__ == "__main__":
    main()
