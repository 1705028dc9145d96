"""Names that are imported when they are first used."""

import subprocess
import sys
import types

import pytest

import stochastic_depth as sd
from stochastic_depth import train


def test_every_name_is_found_and_listed():
    for package in (sd, train):
        assert set(package.__all__) <= set(dir(package))
        assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'aply'"):
        sd.aply  # noqa: B018


@pytest.mark.parametrize(
    "first",
    ["import stochastic_depth.train.fit", "from stochastic_depth.train.fit import Callback"],
)
def test_a_submodule_never_stands_in_place_of_its_function(first):
    program = f"{first}\nfrom stochastic_depth.train import fit\nassert callable(fit)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_package_itself_loads_nothing():
    program = "import sys, stochastic_depth.train.config\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_submodules_load_when_touched():
    assert isinstance(sd.distributed, types.ModuleType)
