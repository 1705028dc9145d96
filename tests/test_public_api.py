import ast
import inspect
import pkgutil
import re
import subprocess
import sys
import types
import typing
from importlib import metadata

import pytest
from torch import nn

import stochastic_depth as sd

PYTORCH_ALONE = """
import sys
from importlib.machinery import ModuleSpec

class Blocked:
    names = {"tyro", "rich", "safetensors", "sklearn", "altair", "vl_convert", "torchvision",
             "scipy", "PIL", "pyarrow", "pandas", "optuna", "tensorboard", "jaxtyping", "beartype",
             "hypothesis"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return ModuleSpec(name, self)

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is not installed")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Blocked())

import torch
import stochastic_depth as sd

model = sd.models.CifarResNet(8)
handle = sd.apply(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4))
loss.backward()
optimizer.step()
model.eval()(torch.randn(1, 3, 32, 32))
sd.remove(model)
assert not Blocked.names & {name.partition(".")[0] for name in sys.modules}
assert sd.distributed.skip_closed and sd.surgery.apply
print("trained", handle.step)
"""

DOCUMENTED = [sd, sd.distributed, sd.export, sd.models, sd.surgery]
PACKAGES = [*DOCUMENTED, sd.block_program, sd.data, sd.train]


@pytest.mark.parametrize("module", PACKAGES, ids=lambda m: m.__name__)
def test_all_is_sorted_and_complete(module: types.ModuleType) -> None:
    for name in module.__all__:
        assert getattr(module, name) is not None  # of a lazy package: once it is touched
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="has no attribute 'aply'"):
        module.aply  # noqa: B018
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and value is not typing.TYPE_CHECKING
        and getattr(value, "__module__", "stochastic_depth").startswith("stochastic_depth")
    }
    # `sd.apply` is a function, and typing's literals belong to no module of ours.
    aliases = {n for n in module.__all__ if typing.get_origin(getattr(module, n)) is not None}
    assert module.__all__ == sorted(module.__all__)
    assert set(module.__all__) - aliases == public - aliases


@pytest.mark.parametrize("module", DOCUMENTED, ids=lambda m: m.__name__)
def test_every_public_name_has_a_docstring(module: types.ModuleType) -> None:
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if typing.get_origin(value) is not None:
            continue
        assert value.__doc__, name
        if isinstance(value, type) and not issubclass(value, Exception):
            for method, member in vars(value).items():
                own = not method.startswith("_") and not hasattr(nn.Module, method)
                if own and isinstance(member, types.FunctionType | property):
                    assert member.__doc__, f"{name}.{method}"


def test_every_module_of_the_package_says_what_it_is() -> None:
    for module in pkgutil.walk_packages(sd.__path__, "stochastic_depth."):
        spec = module.module_finder.find_spec(module.name, None)
        source = spec.loader.get_source(module.name)
        assert source.lstrip().startswith('"""'), module.name


def test_every_error_is_of_the_one_tree() -> None:
    classes = [value for value in vars(sd.errors).values() if inspect.isclass(value)]
    errors = [value for value in classes if not issubclass(value, Warning)]
    assert len(errors) > 12
    assert all(issubclass(error, sd.errors.StochasticDepthError) for error in errors)
    assert [name for name in sd.__all__ if name.endswith("Error")] == []  # one place for each


BLOCK_PROGRAM = "stochastic_depth.block_program."
"""Its blocks and sums are pieces of a program, named as what they compute."""


def test_no_two_classes_of_the_library_share_a_name() -> None:
    places: dict[str, set[str]] = {}
    for module in pkgutil.walk_packages(sd.__path__, "stochastic_depth."):
        if module.name.startswith(BLOCK_PROGRAM):
            continue
        spec = module.module_finder.find_spec(module.name, None)
        for node in ast.parse(spec.loader.get_source(module.name)).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, set()).add(module.name)
    assert len(places) > 150
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


SUBMODULES_WHEN_TOUCHED = """
import sys
import stochastic_depth as sd

assert "stochastic_depth.distributed" not in sys.modules
assert "distributed" in dir(sd)
assert sd.distributed.gates_by_rank.__name__ == "gates_by_rank"
assert not hasattr(sd, "no_such_part")
try:
    from stochastic_depth import train_wheels
except ImportError as error:
    print(error.name)
"""


def test_submodules_load_when_they_are_touched() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", SUBMODULES_WHEN_TOUCHED], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "stochastic_depth"


@pytest.mark.parametrize(
    "first",
    ["import stochastic_depth.train.fit", "from stochastic_depth.train.fit import Callback"],
)
def test_a_submodule_never_stands_in_place_of_its_function(first: str) -> None:
    program = f"{first}\nfrom stochastic_depth.train import fit\nassert callable(fit)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_configuration_is_read_without_pytorch() -> None:
    program = "import sys, stochastic_depth.train.config\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_core_and_the_models_need_pytorch_alone() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", PYTORCH_ALONE], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "trained 1"


def test_the_version_is_the_installed_ones() -> None:
    assert sd.__version__ == metadata.version("stochastic-depth")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", sd.__version__)
