"""Random numbers as pure functions of a key, never of the global random state.

A key is any sequence of integers and words, such as `("gates", seed, step)`. The same key leads to
the same numbers in every process, on every machine and in every version. Their source is SHAKE-128.
"""

import hashlib
import operator

import torch
from torch import Tensor


def digest(count: int, *key: int | str) -> bytes:
    """`count` bytes that depend on `key` alone."""
    # Only a plain integer has the same repr in every library.
    plain = tuple(part if isinstance(part, str) else operator.index(part) for part in key)
    return hashlib.shake_128(repr(plain).encode()).digest(count)


def uniforms(count: int, *key: int | str) -> Tensor:
    """`count` independent numbers, uniform in [0, 1): float64, [count], on the CPU."""
    if count == 0:
        return torch.empty(0, dtype=torch.float64, device="cpu")
    words = torch.frombuffer(bytearray(digest(8 * count, *key)), dtype=torch.int64)
    return (words & (2**53 - 1)).to(torch.float64) * 2.0**-53


def generator(*key: int | str) -> torch.Generator:
    """A random number generator on the CPU, seeded by `key`: for permutations and weights."""
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest(8, *key), "little") >> 1)
