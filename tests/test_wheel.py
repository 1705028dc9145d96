"""The wheel and the sdist, as they are built, installed and run elsewhere."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import stochastic_depth as sd

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, stochastic_depth as sd
from stochastic_depth.models import CifarResNet
assert sd.__file__.startswith(sys.argv[1]), sd.__file__
model = CifarResNet(20)
handle = sd.apply(model)
model(torch.zeros(2, 3, 8, 8)).sum().backward()
foreign = {"tyro", "rich", "safetensors", "sklearn", "altair", "vl_convert", "scipy", "PIL",
           "pyarrow", "jsonschema"}
assert not foreign & set(sys.modules), foreign & set(sys.modules)
print(sd.__version__, handle.step)
"""
COMPILES = """
import pathlib, sys, warnings
warnings.simplefilter("error")
files = sorted(pathlib.Path(sys.argv[1]).rglob("*.py"))
for file in files:
    compile(file.read_bytes(), file, "exec")
print(len(files))
"""
ANYWHERE = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=ANYWHERE, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, folder: Path) -> Path:
    run(sys.executable, "-m", "build", kind, "--no-isolation", "--outdir", folder, ROOT)
    return next(path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("--wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build("--sdist", tmp_path_factory.mktemp("sdist"))


def test_a_wheel_holds_the_package_its_types_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "stochastic_depth/py.typed" in names
    for kind in ("html", "css", "js"):
        assert f"stochastic_depth/lab/template/report.{kind}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    source = ROOT / "src"
    modules = {str(p.relative_to(source)) for p in (source / "stochastic_depth").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


def test_an_sdist_holds_what_the_wheel_is_built_from_and_what_tests_it(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "mkdocs.yml"}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "src").rglob("*.py")}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*.py")}
    assert not expected - names
    strange = {name.split("/")[0] for name in names} & {".venv", "runs", "dist", "site", ".git"}
    assert not strange


def test_the_core_of_an_installed_wheel_needs_pytorch_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert run(sys.executable, "-c", PROGRAM, tmp_path) == f"{sd.__version__} 1\n"


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_into_an_empty_environment(kind, request, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    there = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    install = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--target", there]
    run(sys.executable, "-m", "pip", "install", *install, request.getfixturevalue(kind))
    # Last, so that nothing of this environment stood in for what was to be installed.
    (there / "torch.pth").write_text(sysconfig.get_path("purelib"))
    assert (
        run(python, "-m", "stochastic_depth", "--version") == f"stochastic-depth {sd.__version__}\n"
    )
    found = run(python, "-c", "import stochastic_depth; print(stochastic_depth.__file__)")
    assert found.startswith(str(there))


def interpreters() -> list[str]:
    """Those of the supported versions of Python that are installed here."""
    found = [shutil.which(f"python3.{minor}") for minor in (11, 12, 13, 14)]
    found += [str(p) for p in Path.home().glob(".pyenv/versions/3.1[1-9].*/bin/python")]
    works = [
        p for p in found if p and not subprocess.run([p, "-V"], capture_output=True).returncode
    ]
    return works or [sys.executable]


@pytest.mark.parametrize("python", interpreters())
def test_every_file_is_of_the_language_of_a_supported_python(python, wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert int(run(python, "-c", COMPILES, tmp_path / "stochastic_depth")) > 50
