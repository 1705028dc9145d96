"""Read pickled numpy arrays without running anything that the file asks for.

A pickle is a program. This reader gives it no function of Python or numpy at all: the few names
that a pickled array mentions stand for small objects of this module that check what they get, and
every other name is refused.
"""

import math
import pickle
import pickletools
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from stochastic_depth.data.folders import read_file
from stochastic_depth.errors import DataError

DTYPES = {"u1": torch.uint8, "i1": torch.int8, "i4": torch.int32, "i8": torch.int64}

TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
MOST_TUPLES = 100
MOST_OPERATIONS = 5_000_000
INTEGERS = {"INT", "LONG", "LONG1", "LONG4"}
MEMO_READS = {"GET", "BINGET", "LONG_BINGET"}
MEMO_WRITES = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
OPERATIONS = set(
    """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE
    INT BININT BININT1 BININT2 LONG LONG1 LONG4
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE
    GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()
).union(TUPLES, MEMO_READS, MEMO_WRITES)


def read_pickle(path: Path) -> object:
    """The object in the file: dictionaries, lists, numbers, bytes, words; arrays as tensors.

    Raises:
        DataError: truncated, damaged, or with anything else in it.
    """
    content = read_file(path)
    try:
        check_operations(content)
        return finish(ArrayUnpickler(BytesIO(content), encoding="bytes").load())
    except Exception as error:
        # A damaged pickle can raise nearly anything: see the documentation of pickle.
        raise DataError(
            f"{path}: expected a pickle of numbers, words and numpy arrays, found "
            f"{len(content)} bytes that are not ({type(error).__name__}: {str(error)[:200]}): "
            "fetch it again from where it was published"
        ) from error


def check_operations(content: bytes) -> None:
    """Refuse operations that no such file needs, and those that take time or memory out of
    proportion: a memo of billions of entries, tuples whose hash is exponential in their depth,
    long integers, of which any number have the same hash."""
    memo: dict[int, bool] = {}
    tuples, on_top = 0, False
    for count, (operation, argument, position) in enumerate(pickletools.genops(content)):
        name = operation.name
        if name not in OPERATIONS or count > MOST_OPERATIONS:
            raise pickle.UnpicklingError(f"operation {name} at byte {position}")
        if name in INTEGERS and not -(2**63) <= int(argument or 0) < 2**63:
            raise pickle.UnpicklingError(f"an integer of more than 64 bits at byte {position}")
        if name in MEMO_WRITES:
            index = len(memo) if name == "MEMOIZE" else int(argument or 0)
            if index > len(content):
                raise pickle.UnpicklingError(f"memo index {index} at byte {position}")
            memo[index] = on_top
            continue
        on_top = name in TUPLES
        tuples += on_top
        if tuples > MOST_TUPLES or (name in MEMO_READS and memo.get(int(argument or 0))):
            raise pickle.UnpicklingError(f"tuples within tuples at byte {position}")


class ArrayUnpickler(pickle.Unpickler):
    """Knows the names that numpy writes for an array, before version 2 and since."""

    def find_class(self, module_name: str, global_name: str, /) -> object:
        try:
            return Stand(STANDS[module_name.replace("numpy.core.", "numpy._core."), global_name])
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module_name[:80]}.{global_name[:80]}, which no such file needs"
            ) from None


class Stand:
    """What a name in the pickle stands for: can be called, not changed."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., object]):
        self._build = build

    def __call__(self, *arguments: object) -> object:
        return self._build(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it tries to change a function")


class DType:
    """Stands for numpy.dtype: only plain integers in the byte order of x86 and ARM."""

    def __init__(self, code: object, *_: object):
        name = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(name, str) or name not in DTYPES:
            raise pickle.UnpicklingError(
                "an array of a dtype that is not one of " + ", ".join(DTYPES)
            )
        self.dtype = DTYPES[name]

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or state[1] not in ("|", "<", b"|", b"<"):
            raise pickle.UnpicklingError("an array in a foreign byte order")


class Array:
    """Stands for numpy.ndarray, made empty and filled by its state."""

    def __init__(self, *_: object):
        self.tensor: Tensor | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array without its state")
        _, shape, dtype, fortran, content = state
        self.tensor = tensor(content, dtype, shape, "F" if fortran else "C")


def tensor(content: object, dtype: object, shape: object, order: object) -> Tensor:
    """An array from its bytes, if their number is what the shape says."""
    if not isinstance(content, bytes | bytearray) or not isinstance(dtype, DType):
        raise pickle.UnpicklingError("an array of Python objects")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError("an array whose shape is not integers")
    if len(content) != math.prod(shape) * dtype.dtype.itemsize or not content:
        raise pickle.UnpicklingError(f"an array of shape {shape} in {len(content)} bytes")
    flat = torch.frombuffer(bytearray(content), dtype=dtype.dtype)
    if order in ("F", b"F"):
        return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape)))).contiguous()
    return flat.reshape(shape)


def filled(content: object, dtype: object, shape: object, order: object) -> Array:
    """Stands for numpy's _frombuffer, which protocol 5 uses."""
    array = Array()
    array.tensor = tensor(content, dtype, shape, order)
    return array


def encode(text: object, codec: object) -> bytes:
    """Stands for _codecs.encode, with which Python 3 writes bytes in the older protocols."""
    if not isinstance(text, str) or codec not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("bytes in a foreign encoding")
    return text.encode("latin1")


def refuse(*_: object) -> object:
    raise pickle.UnpicklingError("it calls numpy.ndarray")


STANDS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy._core.multiarray", "_reconstruct"): Array,
    ("numpy._core.numeric", "_frombuffer"): filled,
    ("numpy", "ndarray"): refuse,
    ("numpy", "dtype"): DType,
    ("_codecs", "encode"): encode,
}


def finish(value: object) -> object:
    """Tensors in place of the stands, in the dictionary that these files are.

    Not in dictionaries within it: these can hold one another exponentially often.
    """
    if isinstance(value, dict):
        return {key: built(item) for key, item in value.items()}
    return built(value)


def built(value: object) -> object:
    if not isinstance(value, Array):
        return value
    if value.tensor is None:
        raise pickle.UnpicklingError("an array without its state")
    return value.tensor
