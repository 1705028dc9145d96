"""Write an exported network to a file, read it back, and compare its outputs."""

import hashlib
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stochastic_depth.errors import ExportError, first_line
from stochastic_depth.export.description import CHECKSUM, KEY
from stochastic_depth.export.load import load_export
from stochastic_depth.export.network import Plain
from stochastic_depth.extras import require
from stochastic_depth.files import write_output
from stochastic_depth.train.weights import checksum

Format = Literal["safetensors", "torch", "onnx"]
LIMIT = 1e-4
"""The largest accepted difference of outputs, relative to the largest output."""


def write_export(path: Path, plain: Plain, form: Format) -> float:
    """Write a network to a file, with its description inside and in a second file.

    The file is read back and run on all images together, and on one image alone.

    Args:
        path: the file; the description is also written to the same path with ".json" appended.

    Returns:
        The largest difference of the outputs, relative to the largest of them.

    Raises:
        ExportError: when outputs differ; nothing is written.
        RunError: when the files cannot be written.
        MissingExtraError: when what the format needs is not installed.
    """
    content, run = WRITERS[form](plain)
    images, expected = plain.images, plain.expected
    with torch.no_grad():
        together, alone = run(images) - expected, run(images[:1]) - expected[:1]
    largest = torch.cat((together, alone)).abs().max()
    difference = (largest / expected.abs().max()).item()
    if not difference <= LIMIT:
        raise ExportError(
            f"{path} is not written: read back, its outputs differ by {difference:.2g} of the "
            "largest one"
        )
    write_output(path, content)
    write_output(path.with_name(path.name + ".json"), plain.description.to_json().encode())
    return difference


def _safetensors(plain: Plain) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    save = require("safetensors.torch", "train").save
    tensors = plain.model.state_dict() | plain.statistics
    weights = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = {KEY: plain.description.to_json()}
    content = save(weights, metadata={**about, CHECKSUM: checksum(weights, about)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "written.safetensors"
        path.write_bytes(content)
        return content, load_export(path).model


def _torch(plain: Plain) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    program = torch.export.export(plain.model, (_two(plain),), dynamic_shapes=_any_batch())
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={KEY: plain.description.to_json()})
    content = buffer.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()


def _onnx(plain: Plain) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "export")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own code
        program: Any = torch.onnx.export(
            plain.model,
            (_two(plain),),
            dynamo=True,
            dynamic_shapes=_any_batch(),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    proto = program.model_proto
    proto.metadata_props.add(key=KEY, value=plain.description.to_json())
    content: bytes = proto.SerializeToString()
    content += onnx_checksum(content)
    return content, read_onnx(content)[0]


WRITERS: dict[Format, Callable[[Plain], tuple[bytes, Callable[[Tensor], Tensor]]]] = {
    "safetensors": _safetensors,
    "torch": _torch,
    "onnx": _onnx,
}


def onnx_checksum(content: bytes) -> bytes:
    """The property with the checksum of an ONNX file, which is appended to the file.

    A protobuf message may be continued: its reader adds this property to those in `content`.
    """
    entry = _field(1, CHECKSUM.encode()) + _field(2, hashlib.sha256(content).hexdigest().encode())
    return _field(14, entry)  # ModelProto.metadata_props


def _field(number: int, value: bytes) -> bytes:
    """A field of a protobuf message, with a value of fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(value)]) + value


def read_onnx(content: bytes) -> tuple[Callable[[Tensor], Tensor], str]:
    """The network in an ONNX file as a function from images to logits, and its description as JSON.

    Raises:
        ExportError: when onnxruntime cannot load it, `write_export` has not written it, or it has
            changed since.
        MissingExtraError: when onnxruntime is not installed.
    """
    runtime = require("onnxruntime", "export")
    try:
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen exception types
        raise ExportError(
            f"onnxruntime cannot load it ({first_line(error)}): export the run again, or with "
            "another --format"
        ) from error
    description = session.get_modelmeta().custom_metadata_map.get(KEY)
    if description is None:
        raise ExportError(
            "it has no network description: give a file that stochastic-depth export wrote"
        )
    size = len(content) - len(onnx_checksum(b""))
    if content[size:] != onnx_checksum(content[:size]):
        raise ExportError(
            "it is damaged or was changed, its checksum does not match: put a copy in its place, "
            "or export the run again"
        )

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run, description


def _two(plain: Plain) -> Tensor:
    return torch.zeros(2, *plain.description.input.shape)


def _any_batch() -> Any:
    return ({0: torch.export.Dim("batch")},)
