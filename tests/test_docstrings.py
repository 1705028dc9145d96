"""Docstrings are true: examples of public names run, and arguments that are described exist."""

import ast
import doctest
import inspect
import itertools
import re
import typing
from collections.abc import Iterator
from pathlib import Path

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


Described = ast.FunctionDef | ast.ClassDef


def arguments_described(node: Described) -> list[str]:
    """The names that the section `Args:` of a docstring describes."""
    section = re.search(r"^Args:\n((?: +.*\n?|\n)*)", ast.get_docstring(node) or "", re.MULTILINE)
    return re.findall(r"^    \*{0,2}(\w+):", section[1], re.MULTILINE) if section else []


def parameters(node: Described) -> set[str]:
    """The parameters of a function; those of its initialiser, and its fields, for a class."""
    if isinstance(node, ast.ClassDef):
        fields = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
        inits = [each for each in node.body if getattr(each, "name", "") == "__init__"]
        return {field.id for field in fields if isinstance(field, ast.Name)}.union(
            *(parameters(each) for each in inits if isinstance(each, ast.FunctionDef))
        )
    return {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}


def described() -> Iterator[tuple[str, Described]]:
    for path in sorted(Path(sd.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Described) and arguments_described(node):
                yield f"{path.name}: {node.name}", node


def test_every_argument_that_a_docstring_describes_is_a_parameter():
    wrong = {
        name: unknown
        for name, node in described()
        if (unknown := set(arguments_described(node)) - parameters(node))
    }
    assert len(list(described())) > 100
    assert wrong == {}
