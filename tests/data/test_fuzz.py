"""No bytes make a reader raise anything but the project's own errors."""

import contextlib
import json
import random
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stochastic_depth.cli.arguments import parse_recipe
from stochastic_depth.cli.train import Begin
from stochastic_depth.errors import StochasticDepthError
from stochastic_depth.train import Config
from support.readers import READERS, whole_files

INTERESTING = [0, 1, -1, 0x7F, 0x80, 0xFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1]


def altered(content: bytes, seed: int) -> bytes:
    """Some bytes changed, cut out, repeated or put in; lengths made large."""
    chance, changed = random.Random(seed), bytearray(content)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            form = chance.choice(["<i", ">i", "<q", ">q"])
            bits = 8 * struct.calcsize(form)
            number = (chance.choice(INTERESTING) + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
            changed[at : at + bits // 8] = struct.pack(form, number)
        elif kind == 2:
            del changed[at : at + chance.choice([1, 4, 50])]
        elif kind == 3:
            changed[at:at] = changed[at : at + chance.choice([1, 8, 100])]
        elif kind == 4:
            changed[at:at] = chance.randbytes(chance.choice([1, 4, 20]))
        else:
            other = chance.randrange(len(changed) + 1)
            changed[at : at + 8] = changed[other : other + 8]
    return bytes(changed)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")  # of Pillow, on pictures near its limits
@pytest.mark.parametrize("name", READERS)
def test_a_good_file_that_is_altered_is_read_or_refused(name, soak, counts):
    wholes, read = whole_files()[name], READERS[name]
    for whole in wholes:
        read(whole) if name != "weights" or whole is wholes[0] else None
    tries = (5_000 if soak else 300) // (4 if name == "parquet" else 1)
    for seed in range(tries):
        with contextlib.suppress(StochasticDepthError):
            read(altered(wholes[seed % len(wholes)], seed))
    counts["altered files read or refused"] += tries


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(name, content, counts):
    counts["random files read or refused"] += 1
    begun_well = whole_files()[name][0][: len(content)] + content
    for tried in (content, begun_well):
        with contextlib.suppress(StochasticDepthError):
            READERS[name](tried)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just(10**400)
    | st.sampled_from(["linear", "batch", "cpu", "auto", "digits", "a\0b", "\x1b[31m"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@pytest.mark.soak
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_a_configuration_is_taken_as_it_is_or_refused(data, counts):
    counts["configurations taken or refused"] += 1
    values = Config().to_json()
    inner = values
    while True:
        key = data.draw(st.sampled_from(sorted(inner)))
        if not isinstance(inner[key], dict) or data.draw(st.booleans()):
            break
        inner = inner[key]
    inner[key] = data.draw(PLAIN)
    with contextlib.suppress(StochasticDepthError):
        config = Config.from_json(values)
        assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


OPTIONS = [
    "--epochs", "--seed", "--model.depth", "--survival.final", "--survival.rule", "--data.root",
    "--optimizer.milestones", "--optimizer.learning-rate", "--data.augment", "--run", "--quiet",
    "--data.download", "--evaluate-every", "--precision", "--help", "--", "-", "--data.no-download",
]  # fmt: skip
WORDS = [
    "0",
    "1",
    "-1",
    "1e999",
    "nan",
    "inf",
    "None",
    "True",
    "0.5",
    "9" * 5000,
    "linear",
    "[x]",
    "",
]


@pytest.mark.soak
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arguments=st.lists(st.sampled_from(OPTIONS + WORDS) | st.text(max_size=8), max_size=5).map(
        lambda words: [word for word in words if not word.startswith("-h")]
    )
)
def test_any_command_line_is_understood_or_refused(arguments, counts, capsys):
    counts["command lines understood or refused"] += 1
    try:
        begun = parse_recipe("train", "", ["digits", *arguments], Begin, ())
    except (SystemExit, StochasticDepthError):
        return
    assert isinstance(begun.config, Config)
    assert begun.run is None or isinstance(begun.run, Path)
