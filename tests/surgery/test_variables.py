"""What code may change, and which variables hold a new tensor, judged by its form."""

import ast
import textwrap

import pytest

from stochastic_depth.surgery.rewrite.variables import (
    changes_something,
    only_assigns,
    own_tensors,
)


def method(body: str) -> ast.FunctionDef:
    source = "def forward(self, x, h):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.FunctionDef)
    return tree


CHANGES = [
    "x += h",
    "self.steps = 1",
    "x[0] = h",
    "del x",
    "y = x.relu_()",
    "y = torch.nn.init.zeros_(x)",
    "y = self.softmax(x).mul_(h)",
    "y = torch.zeros_like(x).index_add_(0, h, x.relu_())",
    "y = h.pop()",
    "y = next(h)",
    "y = torch.add(x, 1, out=h)",
    "y = F.relu(x, inplace=self.inplace)",
    "y = yield x",
    "import math",
    "self.log(x)",
]
CHANGES_NOTHING = [
    "y, z = self.f(x), h",
    "y = F.relu(x, inplace=False)",
    "y = next(self.parameters()).dtype",
    "y = [f(x) for f in self.parts]",
    "y = x.__len__()",
    "y = torch.zeros_like(x).index_add_(0, h, x)",
    "y = x.clone().mul_(2).add_(h)",
    "y = self.f(x) if h is None else x[0]",
]


@pytest.mark.parametrize("code", CHANGES)
def test_code_that_may_change_an_object_is_recognised_by_its_form(code):
    assert changes_something(method(code).body[0])


@pytest.mark.parametrize("code", CHANGES_NOTHING)
def test_code_that_computes_and_sets_variables_changes_nothing(code):
    assert not changes_something(method(code).body[0])


FILLS = "y = torch.zeros_like(x)\nfor i in h:\n    rows = i > 0\n    y[rows] = self.f(x[rows])\n"
CREATION = "y = torch.zeros_like(x)\n"


def own(body):
    """The own tensors of which the last statement writes parts."""
    block = method(body).body
    return own_tensors(block, len(block) - 1, "self")


@pytest.mark.parametrize(
    "body",
    [
        FILLS,
        FILLS.replace("y[rows] =", "y[rows] +="),
        FILLS.replace(CREATION, f"z = y\n{CREATION}z = x\n"),
        "y = torch.bmm(x, h)\ny *= 0.5",
        "y = x @ h\ny[0] = 1\ny[1:].narrow(0, 1, 1).mul_(h)",
    ],
)
def test_a_new_tensor_that_is_written_part_by_part_is_its_own(body):
    assert own(body) == {"y"}


@pytest.mark.parametrize(
    "body",
    [
        "y[0] = x",
        *(
            FILLS.replace(CREATION, made)
            for made in (
                "y = self.zeros(x)\n",
                "y = x.view(-1)\n",
                "y = torch.zeros_like(x, out=h)\n",
                "y = z = torch.zeros_like(x)\n",
                "if self.fresh:\n    y = torch.zeros_like(x)\n",
            )
        ),
        FILLS.replace("for i", "seen = y\nfor i"),
        FILLS.replace("for i", "later = lambda: y\nfor i"),
        FILLS.replace("rows = i > 0", "rows = self.g(y)"),
        FILLS.replace("y[rows] = ", "z = y[rows] = "),
        FILLS.replace("    y[rows] =", "    z = y.view(-1)\n    y[rows] ="),
        "y = F.relu(x)\ny *= 0.5",
    ],
)
def test_a_tensor_that_something_else_may_hold_is_not_its_own(body):
    assert own(body) == frozenset()


def test_a_loop_that_only_writes_parts_of_own_tensors_may_be_skipped():
    loop = method(FILLS).body[1]
    assert only_assigns(loop, frozenset({"y"}))
    assert not only_assigns(loop, frozenset())


@pytest.mark.parametrize(
    "part",
    ["self.log(x)", "y[rows] = x.relu_()", "y[rows] = (z := x)", "return x"],
)
def test_a_loop_that_does_anything_else_is_not(part):
    loop = method(FILLS + f"    {part}").body[1]
    assert not only_assigns(loop, frozenset({"y"}))
