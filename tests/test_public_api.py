import inspect
import pkgutil
import subprocess
import sys
import types
import typing

import pytest
from torch import nn

import stochastic_depth as sd
import stochastic_depth.distributed
import stochastic_depth.export
import stochastic_depth.models
import stochastic_depth.surgery

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
import stochastic_depth.distributed, stochastic_depth.models, stochastic_depth.surgery

model = sd.models.CifarResNet(8)
handle = sd.apply(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4))
loss.backward()
optimizer.step()
model.eval()(torch.randn(1, 3, 32, 32))
sd.remove(model)
assert not Blocked.names & {name.partition(".")[0] for name in sys.modules}
print("trained", handle.step)
"""

modules = pytest.mark.parametrize(
    "module",
    [sd, sd.export, sd.distributed, sd.models, sd.surgery],
    ids=lambda m: m.__name__,
)


@modules
def test_all_is_sorted_and_complete(module: types.ModuleType) -> None:
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "stochastic_depth").startswith("stochastic_depth")
    }
    # `sd.apply` is a function, and typing's literals belong to no module of ours.
    aliases = {n for n in module.__all__ if typing.get_origin(getattr(module, n)) is not None}
    assert module.__all__ == sorted(module.__all__)
    assert set(module.__all__) - aliases == public - aliases
    assert all(hasattr(module, name) for name in module.__all__)


@modules
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
        spec = module.module_finder.find_spec(module.name, None)  # pyright: ignore
        source = spec.loader.get_source(module.name)
        assert source.lstrip().startswith('"""'), module.name


def test_every_error_is_of_the_one_tree() -> None:
    errors = [value for name, value in vars(sd).items() if name.endswith("Error")]
    assert len(errors) > 5
    assert all(issubclass(error, sd.StochasticDepthError) for error in errors)


def test_the_core_and_the_models_need_pytorch_alone() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", PYTORCH_ALONE], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "trained 1"


def test_the_version_is_the_installed_ones() -> None:
    assert sd.__version__.count(".") >= 2
