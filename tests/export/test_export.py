import hashlib
import json
import struct
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import onnx as onnx_library
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import stochastic_depth as sd
from stochastic_depth.cli import main
from stochastic_depth.cli.export import Export
from stochastic_depth.export import load_export
from stochastic_depth.export.description import CHECKSUM, KEY
from stochastic_depth.export.network import plain_network
from stochastic_depth.models import CifarResNet
from stochastic_depth.train import begin, reopen, trained_model
from stochastic_depth.train.weights import checksum
from support.runs import stop_after
from support.small_sweep import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def truth(trained):
    """Test images, and what the trained network with its gates gives for them."""
    run, images = reopen(trained)
    model, _ = trained_model(run, images)
    x = next(images.evaluate("test"))[0][:40]
    with torch.no_grad():
        return x, model(x)


@pytest.fixture(scope="module")
def file(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "net.safetensors"
    assert main(["export", str(trained), "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def program(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    assert main(["export", str(trained), "--format", "torch", "--out", str(path)]) == 0
    return path


def difference(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def test_the_file_holds_the_plain_network_with_its_original_names(file, truth):
    x, expected = truth
    plain = CifarResNet(14, channels=1)
    plain.load_state_dict(load_file(file), strict=True)
    with torch.no_grad():
        assert difference(plain.eval()(x), expected) < 1e-5
        model, description = load_export(file)
        assert difference(model(x), expected) < 1e-5
    assert not model.training
    assert description.classes == tuple("0123456789")


def inside(path) -> str:
    """The description that a file carries."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as opened:
            return opened.metadata()[KEY]
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.get_modelmeta().custom_metadata_map[KEY]
    extra = {KEY: ""}
    torch.export.load(path, extra_files=extra)
    return extra[KEY]


@pytest.mark.parametrize("kind", ["file", "program", "onnx"])
def test_a_file_of_any_format_says_where_it_comes_from_in_it_and_beside_it(kind, request, trained):
    path = request.getfixturevalue(kind)
    said = json.loads(inside(path))
    assert said == json.loads(path.with_name(path.name + ".json").read_text())
    config = json.loads((trained / "config.json").read_text())
    assert said["source"]["run"] == config["id"]
    assert said["survival"] == config["config"]["survival"]
    assert said["versions"]["stochastic-depth"] == sd.__version__
    assert said["versions"]["torch"] == version("torch")
    assert said["architecture"] == {
        "kind": "CifarResNet",
        "arguments": {"depth": 14, "classes": 10, "channels": 1},
        "removed": [],
    }
    assert said["classes"] == list("0123456789")


def test_the_last_checkpoint_of_a_run_that_stopped_between_evaluations_has_no_errors(tmp_path):
    run, images = begin(replace(SMALL, evaluate_every=2), tmp_path / "run")
    stop_after(3, run, images)
    assert run.records()[-1].step == 2
    source = plain_network(run, images, "last").description.source
    assert (source["validation_error"], source["test_error"], source["best"]) == (None, None, False)


def test_torch_export_takes_batches_of_any_size(program, truth):
    run = torch.export.load(program).module()
    x, expected = truth
    for count in (1, 7, 40):
        with torch.no_grad():
            assert difference(run(x[:count]), expected[:count]) < 1e-5


def test_onnx_takes_batches_of_any_size(onnx, truth):
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    assert isinstance(session.get_inputs()[0].shape[0], str)  # the name of an axis, no number
    x, expected = truth
    for count in (1, 7, 40):
        (logits,) = session.run(["logits"], {"images": x[:count].contiguous().numpy()})
        assert difference(torch.from_numpy(logits), expected[:count]) < 1e-4


def test_a_lower_depth_is_a_smaller_file_that_loads(trained, file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(trained), "--depth", "0.5"]) == 0
    assert f"{trained.name}: choosing" in capsys.readouterr().out
    path = tmp_path / f"{trained.name}-depth-0.5.safetensors"
    model, description = load_export(path)
    assert len(description.architecture.removed) == 3
    assert len(sd.apply(model).blocks) == 3
    assert path.stat().st_size < file.stat().st_size


def test_an_elastic_file_gives_what_it_measured_at_every_depth(elastic, trained, truth):
    _, images = reopen(trained)
    whole = load_export(elastic)
    assert difference(whole.model(truth[0]), truth[1]) < 1e-5
    assert sorted(whole.description.order) == list(range(6))
    assert [choice.blocks for choice in whole.description.choices] == [6, 5, 4, 3, 2, 1]
    for choice in whole.description.choices:
        model = load_export(elastic, depth=choice.blocks / 6).model
        wrong = seen = 0
        for x, labels in images.evaluate("test"):
            with torch.no_grad():
                wrong += (model(x).argmax(1) != labels).sum().item()
            seen += len(labels)
        assert 100 * wrong / seen == pytest.approx(choice.test_error)
        assert sum(p.numel() for p in model.parameters()) == choice.parameters
        assert choice.seconds > 0
    flops = [choice.flops for choice in whole.description.choices]
    assert flops == sorted(flops, reverse=True)


def test_no_export_of_a_run_is_named_as_another():
    networks = [
        {},
        {"format": "onnx"},
        {"checkpoint": "last"},
        {"depth": 0.5},
        {"depth": 0.75},
        {"depth": 0.5, "checkpoint": "last"},
        {"elastic": True},
    ]
    named = [Export(Path("runs/net"), **options).default_name().name for options in networks]
    assert named == [
        "net.safetensors",
        "net.onnx",
        "net-last.safetensors",
        "net-depth-0.5.safetensors",
        "net-depth-0.75.safetensors",
        "net-last-depth-0.5.safetensors",
        "net-elastic.safetensors",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["--depth", "0"], 2, "--depth is 0.0"),
        (["--depth", "1.5"], 2, "--depth is 1.5"),
        (["--elastic", "--format", "onnx"], 2, "--elastic"),
        (["--elastic", "--depth", "0.5"], 2, "--elastic"),
        (["--out", "run/config.json/net.safetensors"], 1, "run/config.json"),
    ],
)
def test_what_cannot_be_exported_is_an_error_of_one_line(
    arguments, code, shown, trained, capsys, monkeypatch
):
    monkeypatch.chdir(trained.parent)
    assert main(["export", str(trained), *arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert shown in error


def rewritten(file, tmp_path, change=lambda values: None, weights=None):
    """A copy of an export with another description, or other weights."""
    with safe_open(file, "pt") as opened:
        values = json.loads(opened.metadata()[KEY])
    change(values)
    path = tmp_path / "changed.safetensors"
    weights, about = weights or load_file(file), {KEY: json.dumps(values)}
    save_file(weights, path, {**about, CHECKSUM: checksum(weights, about)})
    return path


NUMBERS = ("blocks", "validation_error", "test_error", "parameters", "flops", "seconds")
CHOICE = dict.fromkeys(NUMBERS, 1)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda v: v.update(format=2), "format"),
        (lambda v: v.pop("classes"), "classes"),
        (lambda v: v["architecture"].update(kind="Popen"), "no network 'Popen'"),
        (lambda v: v["architecture"]["arguments"].update(depth=6 * 10**8 + 2), "600000002"),
        (lambda v: v["architecture"]["arguments"].update(depth="14"), "'14'"),
        (lambda v: v["architecture"]["arguments"].update(classes=-1), "CifarResNet"),
        (lambda v: v["architecture"]["arguments"].update(classes=11), "head.weight"),
        (lambda v: v["architecture"]["arguments"].update(depth=8), "unexpected"),
        (lambda v: v["architecture"]["arguments"].update(shell=1), "shell"),
        (lambda v: v["architecture"].update(removed=[99]), "cannot be built"),
        (lambda v: v["architecture"].update(removed=[-1]), "understood"),
        (lambda v: v["architecture"].update(removed=[0, 0]), "understood"),
        (lambda v: v["architecture"].update(removed=0), "understood"),
        (lambda v: v.update(order=[0, 0, 1, 2, 3, 4]), "understood"),
        (lambda v: v.update(order=[1, 2, 3, 4, 5, 6]), "understood"),
        (lambda v: v.update(choices=[CHOICE]), "understood"),
        (lambda v: v.update(order=[0], choices=[CHOICE | {"blocks": 2}]), "understood"),
        (lambda v: v.update(order=[0], choices=[CHOICE | {"seconds": "1"}]), "understood"),
        (lambda v: v["input"].update(std=[0.0]), "understood"),
        (lambda v: v["input"].update(shape=[1, 10**9, 10**9]), "understood"),
        (lambda v: v["input"].update(mean="x"), "understood"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(change, shown, file, tmp_path):
    path = rewritten(file, tmp_path, change)
    with pytest.raises(sd.errors.ExportError, match=r"changed\.safetensors") as error:
        load_export(path)
    assert shown in str(error.value)


@pytest.mark.parametrize("blocks", [5, 7])
def test_an_order_of_more_or_fewer_blocks_than_the_network_has_is_refused(blocks, file, tmp_path):
    about = {"order": list(range(blocks)), "choices": [CHOICE]}
    path = rewritten(file, tmp_path, lambda values: values.update(about))
    with pytest.raises(sd.errors.ExportError, match=f"orders {blocks} blocks, its network has 6"):
        load_export(path, depth=1 / blocks)


def test_foreign_and_damaged_files_are_refused(file, tmp_path):
    content = file.read_bytes()
    for number, damaged in enumerate(
        [b"", b"\x80\x04N.", content[:1000], content[:-1], struct.pack("<Q", 2**62) + content[8:]]
    ):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(damaged)
        with pytest.raises(sd.errors.ExportError, match="not a complete safetensors file"):
            load_export(path)
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(sd.errors.ExportError, match="has no network description"):
        load_export(tmp_path / "foreign.safetensors")
    with pytest.raises(sd.errors.ExportError, match=r"none\.safetensors does not exist"):
        load_export(tmp_path / "none.safetensors")
    weights = load_file(file)
    weights.pop("head.bias")
    with pytest.raises(sd.errors.ExportError, match=r"'head\.bias' is missing"):
        load_export(rewritten(file, tmp_path, weights=weights))


@pytest.mark.parametrize("kind", ["file", "elastic", "onnx"])
def test_one_bit_that_changed_is_an_error_that_names_the_file(
    kind, request, pictures, tmp_path, capsys
):
    original = request.getfixturevalue(kind)
    content = bytearray(original.read_bytes())
    weights = [tensor for tensor in inside_weights(original) if len(tensor) > 1000]
    for number, tensor in enumerate((weights[0], weights[-1])):
        path = tmp_path / f"{number}{original.suffix}"
        content[content.index(tensor) + 503] ^= 64  # the exponent of a float32
        path.write_bytes(content)
        assert main(["predict", str(path), pictures[0][0]]) == 1
        shown = capsys.readouterr().err
        assert f"{path}" in shown
        assert "damaged or was changed, its checksum does not match" in shown
        assert shown.count("\n") == 1


def inside_weights(path) -> list[bytes]:
    """The bytes of each tensor in a file."""
    if path.suffix == ".onnx":
        return [tensor.raw_data for tensor in onnx_library.load(path).graph.initializer]
    return [tensor.numpy().tobytes() for tensor in load_file(path).values()]


def test_a_file_without_a_checksum_is_refused(file, tmp_path):
    path = tmp_path / "without.safetensors"
    save_file(load_file(file), path, {KEY: inside(file)})
    with pytest.raises(
        sd.errors.ExportError, match=r"without\.safetensors has no checksum: export"
    ):
        load_export(path)


def test_the_checksum_of_an_onnx_file_is_one_of_its_properties(onnx):
    onnx_library.checker.check_model(onnx_library.load(onnx))
    properties = {entry.key: entry.value for entry in onnx_library.load(onnx).metadata_props}
    content = onnx.read_bytes()
    rest = onnx_library.load(onnx)
    del rest.metadata_props[-1]
    assert (
        hashlib.sha256(content[: len(rest.SerializeToString())]).hexdigest() == properties[CHECKSUM]
    )


def test_one_depth_is_no_other(file, elastic):
    with pytest.raises(
        sd.errors.ExportError, match=r"depth=0\.5: its depth is fixed; export with --elastic"
    ):
        load_export(file, depth=0.5)
    with pytest.raises(
        sd.errors.ExportError,
        match="depth=0: it is a fraction of the blocks, above 0 and at most 1",
    ):
        load_export(elastic, depth=0)
