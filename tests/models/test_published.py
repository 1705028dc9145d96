import pytest
import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.models.published import published

pytestmark = pytest.mark.usefixtures("one_thread")


def linear():
    return nn.Linear(4, 2)


def with_example():
    return nn.Linear(4, 2), torch.zeros(3, 4)


def wants_more(width):
    return nn.Linear(width, width)


def mistaken():
    return nn.Linear(2, "x")


a_model = nn.Linear(2, 2)


def three():
    return nn.Linear(4, 2), torch.zeros(3, 4), 5


def alone():
    return (nn.Linear(4, 2),)


def not_a_module():
    return 3


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("timm/resnet18", (3, 64, 64), {"num_classes": 5}),
        ("torchvision/resnet18", (3, 64, 64), {}),
        ("torchvision/fcn_resnet50", (3, 64, 64), {}),
        ("transformers/gpt2", None, {"n_layer": 1, "n_embd": 16, "n_head": 2}),
        ("transformers/vit", None, {"num_hidden_layers": 1, "image_size": 32}),
        ("transformers/t5", None, {"num_layers": 1, "d_model": 16, "d_ff": 16}),
        ("transformers/wav2vec2", None, {"num_hidden_layers": 1}),
        ("transformers/clip", None, {}),
    ],
)
def test_a_model_takes_its_example(name, shape, options):
    pytest.importorskip(name.partition("/")[0], reason=f"needs {name.partition('/')[0]}")
    model, example = published(name, shape=shape, **options)
    with torch.no_grad():
        model.eval()(**example) if isinstance(example, dict) else model.eval()(example)


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "transformers/vit"])
def test_the_structure_alone_has_no_storage(name):
    pytest.importorskip(name.partition("/")[0], reason=f"needs {name.partition('/')[0]}")
    model, example = published(name, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sd.plan(model, example).complete


def test_a_factory_gives_a_model_with_or_without_example():
    model, example = published(f"{__name__}:with_example")
    assert example.shape == (3, 4)
    model, example = published(f"{__name__}:linear", shape=(4,), batch=5)
    assert model(example).shape == (5, 2)


def test_a_mistake_in_a_factory_is_not_blamed_on_how_it_is_called():
    with pytest.raises(TypeError, match="empty"):
        published(f"{__name__}:mistaken")


def test_options_that_a_factory_cannot_take_are_refused():
    with pytest.raises(sd.errors.ConfigError, match=r"is called without arguments.*take width"):
        published(f"{__name__}:with_example", width=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", r"'resnet50' does not name a model: give timm/NAME, torchvision/NAME"),
        ("timm/resnet5000", r"timm has no model 'resnet5000'; did you mean resnet50"),
        ("torchvision/swin_x", r"torchvision has no model 'swin_x'; did you mean swin_"),
        ("transformers/gpt22", r"transformers has no model 'gpt22'; did you mean gpt2"),
        ("torchvision/fasterrcnn_resnet50_fpn", r"takes lists of images.*factory"),
        ("transformers/nowhere.json", r"no configuration nowhere\.json"),
        ("nowhere:model", r"'nowhere:model' cannot be imported.*nowhere.*module:function"),
        (f"{__name__}:nothing", r"has no attribute 'nothing'"),
        (f"{__name__}:wants_more", r"cannot be called without arguments.*'width'"),
        (f"{__name__}:a_model", r"is a model: name a function that returns one"),
        (f"{__name__}:linear", r"no example of its input.*--shape"),
        (f"{__name__}:not_a_module", r"returns int, not a module"),
        (f"{__name__}:three", r"returns 3 values: return a model, or \(model, example\), where"),
        (f"{__name__}:alone", r"returns 1 value: return a model, or \(model, example\)"),
    ],
)
def test_what_is_no_model_is_named(name, message):
    library = name.partition("/")[0]
    if library in ("timm", "torchvision", "transformers"):
        pytest.importorskip(library, reason=f"needs {library}")
    with pytest.raises(sd.errors.ConfigError, match=message):
        published(name)
