"""Every engine trains alike, and `auto` takes the best there is and says why."""

import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from stochastic_depth.block_program import library
from stochastic_depth.errors import ConfigError
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import (
    Config,
    DataConfig,
    ModelConfig,
    SurvivalConfig,
    begin,
    fit,
    reopen,
)
from stochastic_depth.train.engine_choice import choose_engine

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # torch's own
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
NO_KERNELS = "no C++ compiler was found"


def losses(config, path, watch):
    return [record.train_loss for record in fit(*begin(config, path), watch)]


@pytest.fixture
def float32(small):
    survival, model = SurvivalConfig(final=0.8), ModelConfig(depth=8)
    return replace(small, precision="float32", survival=survival, model=model, epochs=1)


@pytest.mark.parametrize("rule", ["linear", "constant"])
@pytest.mark.parametrize(
    "engine",
    [
        "program",
        pytest.param(
            "compiled",
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs g++: the compiler's"),
        ),
    ],
)
def test_every_engine_has_the_curve_of_autograd(engine, rule, float32, tmp_path, silent):
    config = replace(float32, survival=SurvivalConfig(rule=rule, final=0.8), epochs=4)
    config = replace(config, evaluate_every=10)
    curves = [
        losses(replace(config, engine=name), tmp_path / name, silent) for name in ("eager", engine)
    ]
    assert curves[1] == pytest.approx(curves[0], abs=2e-3)
    assert curves[0][-1] < curves[0][0]


@pytest.mark.skipif(
    library.why_unavailable() is not None, reason=f"needs kernels: {library.why_unavailable()}"
)
def test_native_kernels_have_the_curve_of_autocast(small, tmp_path, silent):
    config = replace(small, precision="bfloat16", survival=SurvivalConfig(final=0.8))
    curves = [
        losses(replace(config, engine=name), tmp_path / name, silent) for name in ("eager", "auto")
    ]
    assert curves[1] == pytest.approx(curves[0], abs=3e-2)


def test_a_block_program_resumes_where_it_was(float32, tmp_path, silent):
    config = replace(float32, engine="program", evaluate_every=3)
    whole = losses(config, tmp_path / "whole", silent)
    run, images = begin(config, tmp_path / "halved")
    first = next(records := fit(run, images, silent)).train_loss
    records.close()
    rest = [record.train_loss for record in fit(*reopen(run.path), silent)]
    assert [first, *rest] == whole
    weights = [(tmp_path / name / "model.safetensors") for name in ("whole", "halved")]
    tensors = [load_file(path) for path in weights]
    assert all(tensors[0][name].equal(tensor) for name, tensor in tensors[1].items())


def test_a_mini_batch_that_is_not_whole_goes_by_autograd(float32, tmp_path, silent):
    few = replace(float32, data=replace(float32.data, train=40))
    curves = [
        losses(replace(few, engine=name), tmp_path / name, silent) for name in ("eager", "program")
    ]
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "engine", "because"),
    [
        ({}, "program", "native kernels"),
        ({"model": ModelConfig(kind="densenet", depth=10)}, "eager", "this is DenseNet"),
        ({"survival": SurvivalConfig(gate="sample")}, "eager", 'this is gate="sample"'),
        ({"survival": SurvivalConfig(closed="forward-only")}, "eager", "skips closed branches"),
        ({"data": DataConfig(name="folder"), "precision": "float32"}, "program", "native kernels"),
        ({"engine": "eager"}, "eager", "as asked"),
        ({"engine": "compiled"}, "compiled", "as asked"),
        ({"engine": "program"}, "program", "as asked"),
    ],
)
def test_auto_says_what_it_takes_and_why(changes, engine, because, monkeypatch):
    for obstacle in ("why_unavailable", "why_unmeasured"):
        monkeypatch.setattr(f"stochastic_depth.train.engine_choice.{obstacle}", lambda: None)
    config = replace(RECIPES["digits"](), **changes)
    choice = choose_engine(config, "cpu", "float32" if "precision" in changes else "bfloat16")
    assert choice.engine == engine
    assert because in choice.because
    assert choice.kernels == ("native" if engine == "program" else "reference")


@pytest.mark.parametrize(
    ("device", "precision", "absent", "because"),
    [
        ("cpu", "float32", None, "8 pixels a side, these have 12"),
        ("cpu", "bfloat16", NO_KERNELS, NO_KERNELS),
        ("cuda", "bfloat16", None, "not been measured"),
    ],
)
def test_auto_falls_back_to_autograd(device, precision, absent, because, monkeypatch):
    monkeypatch.setattr("stochastic_depth.train.engine_choice.why_unavailable", lambda: absent)
    config = Config(data=DataConfig(name="cifar10", size=12))
    choice = choose_engine(config, device, precision)
    assert (choice.engine, choice.kernels) == ("eager", "reference")
    assert because in choice.because


def test_auto_takes_the_program_in_float32_where_its_kernels_fit_the_images(monkeypatch):
    for obstacle in ("why_unavailable", "why_unmeasured"):
        monkeypatch.setattr(f"stochastic_depth.train.engine_choice.{obstacle}", lambda: None)
    config = RECIPES["cifar10-resnet110"]()
    assert choose_engine(config, "cpu", "float32")[:2] == ("program", "native")
    for size, engine in ((16, "program"), (20, "eager")):
        smaller = replace(config, data=replace(config.data, size=size))
        assert choose_engine(smaller, "cpu", "float32").engine == engine
    assert choose_engine(RECIPES["digits"](), "cpu", "float32").engine == "program"


@pytest.mark.parametrize(
    ("engine", "changes", "obstacle"),
    [
        ("program", {"survival": SurvivalConfig(gate="subset")}, 'needs gate="batch"'),
        (
            "compiled",
            {
                "model": ModelConfig(kind="densenet", depth=10),
                "survival": SurvivalConfig(rule="constant"),
            },
            "a densenet has no residual blocks, which are all that is compiled",
        ),
    ],
)
def test_an_engine_that_cannot_train_the_network_leaves_no_folder(
    engine, changes, obstacle, small, tmp_path
):
    config = replace(small, engine=engine, **changes)
    with pytest.raises(
        ConfigError, match=f"engine is {engine}: .*{obstacle}.*; use --engine eager"
    ):
        begin(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_compiler_native_kernels_say_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in library.why_unavailable()
