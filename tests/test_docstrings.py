"""The examples in the docstrings of public names run, and show what they say."""

import doctest
import inspect
import itertools
import typing

import pytest
import torch
from torch import nn

import stochastic_depth as sd

PUBLIC = [
    name
    for name in sd.__all__
    if callable(value := getattr(sd, name))
    and typing.get_origin(value) is None
    and not name.endswith("Error")
]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_that_runs(name):
    torch.manual_seed(0)
    names = {"sd": sd, "torch": torch, "nn": nn, "itertools": itertools}
    value = getattr(sd, name)
    found = doctest.DocTestFinder().find(value, name, inspect.getmodule(value), extraglobs=names)
    assert any(test.examples for test in found)
    for test in found:
        runner = doctest.DocTestRunner(optionflags=OPTIONS)
        said: list[str] = []
        assert runner.run(test, out=said.append).failed == 0, "".join(said)
