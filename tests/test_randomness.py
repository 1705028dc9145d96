import hashlib
import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from stochastic_depth.randomness import digest, generator, uniforms

FRESH_PROCESS = """
import torch
from stochastic_depth.randomness import digest, generator, uniforms
torch.manual_seed(123)
print(digest(8, "gates", 1, 2).hex())
print(uniforms(5, "gates", 1, 2).tolist())
print(torch.randperm(20, generator=generator("order", 3)).tolist())
"""


def test_the_same_key_gives_the_same_numbers_in_another_process() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS], capture_output=True, text=True, check=True
    )
    assert answer.stdout.splitlines() == [
        digest(8, "gates", 1, 2).hex(),
        str(uniforms(5, "gates", 1, 2).tolist()),
        str(torch.randperm(20, generator=generator("order", 3)).tolist()),
    ]


def test_pinned_values_hold_in_every_version() -> None:
    assert digest(8, "gates", 0, 0).hex() == "cb9a401f0c78ce1c"
    assert uniforms(3, "gates", 0, 0).tolist() == [
        0.45215421775795883,
        0.10836903619669047,
        0.2979284380509044,
    ]


@pytest.mark.parametrize("integer", [np.int64, np.array, torch.tensor])
def test_integers_of_every_library_are_the_same_key(integer) -> None:
    assert digest(8, "gates", integer(3), integer(0)) == digest(8, "gates", 3, 0)
    with pytest.raises(TypeError):
        digest(8, "gates", 3.0)


def test_uniforms_are_the_low_53_bits_of_shake_128() -> None:
    stream = hashlib.shake_128(b"('gates', 4, 5)").digest(8 * 100)
    expected = [
        (int.from_bytes(stream[i : i + 8], "little") % 2**53) / 2**53 for i in range(0, 800, 8)
    ]
    assert uniforms(100, "gates", 4, 5).tolist() == expected


def test_different_keys_give_unrelated_numbers() -> None:
    keys = [(), (0,), ("0",), ("gates",), ("gates", 0), ("gates", 0, 1), ("gates", 1, 0)]
    keys += [("gates", 10), ("gates", 1, 0, 0), ("weights", 0, 1), ("gates", -1), ("gates", 2**80)]
    for one, other in itertools.combinations(keys, 2):
        a, b = uniforms(400, *one), uniforms(400, *other)
        assert not torch.isin(a, b).any()
        assert stats.pearsonr(a, b).pvalue > 1e-4, (one, other)


@pytest.mark.parametrize("key", [("gates", 0, 0), ("gates", 1, 0), ("gates", 0, 1)])
def test_uniforms_are_uniform(key: tuple) -> None:
    numbers = uniforms(100_000, *key)
    assert numbers.dtype == torch.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 0.01


def test_uniforms_over_the_keys_are_uniform() -> None:
    numbers = [uniforms(1, "gates", 0, step).item() for step in range(20_000)]
    assert stats.kstest(numbers, "uniform").pvalue > 0.01


def test_fewer_uniforms_are_the_first_of_more() -> None:
    assert uniforms(7, "a").tolist() == uniforms(100, "a")[:7].tolist()
    assert uniforms(0, "a").shape == (0,)


def test_generators_are_independent_of_each_other_and_equal_under_one_key() -> None:
    def first(*key: int | str) -> list[float]:
        return torch.rand(4, generator=generator(*key)).tolist()

    assert first("weights", 0) == first("weights", 0)
    assert first("weights", 0) != first("weights", 1)
    assert first("weights", 0) != first("order", 0)


def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    def draw() -> tuple:
        numbers = uniforms(10, "gates", 0, 0)
        rng = generator("weights", 0)
        return numbers.tolist(), torch.randn(10, generator=rng).tolist()

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    numbers = draw()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    torch.manual_seed(2), random.seed(2), np.random.seed(2)
    assert draw() == numbers
