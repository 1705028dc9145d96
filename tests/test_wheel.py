import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, stochastic_depth as sd
from stochastic_depth.models import CifarResNet
assert sd.__file__.startswith(sys.argv[1]), sd.__file__
model = CifarResNet(20)
depth = sd.apply(model)
model(torch.zeros(2, 3, 8, 8)).sum().backward()
foreign = {"tyro", "rich", "safetensors", "sklearn", "altair", "vl_convert", "scipy", "PIL",
           "pyarrow", "jsonschema"}
assert not foreign & set(sys.modules), foreign & set(sys.modules)
print(sd.__version__, depth.step)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_a_wheel_holds_the_package_its_types_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "stochastic_depth/py.typed" in names
    for kind in ("html", "css", "js"):
        assert f"stochastic_depth/report/template/report.{kind}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    source = ROOT / "src"
    modules = {str(p.relative_to(source)) for p in (source / "stochastic_depth").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


def test_the_core_of_an_installed_wheel_needs_pytorch_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True)
    assert done.stdout == "0.1.0 1\n", done.stderr
