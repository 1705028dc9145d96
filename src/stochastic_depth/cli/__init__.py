"""The command line: parse, call, print.

PyTorch is not imported before a command line has been understood, so that help and errors appear at
once.

Exit codes: 0 for success; 1 for an error, which is printed in one line; 2 for a command line that
cannot be understood; 128 + n when stopped by signal n, with a checkpoint if a run was training.
"""

import importlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from stochastic_depth.errors import StochasticDepthError
from stochastic_depth.extras import require
from stochastic_depth.files import reason
from stochastic_depth.plain_text import escaped

COMMANDS = {
    "train": "train a recipe, or resume a run",
    "eval": "test error of a run's network",
    "compare": "a recipe against its constant-depth twin, over seeds",
    "analyze": "gradients, active blocks, the ensemble, pruning",
    "sweep": "a recipe over a grid: p_L and rules, p_L and depths, or gatings",
    "report": "tables and figures of runs, on one page",
    "export": "a run's network as a plain file, at full or lower depth",
    "predict": "what a run's or an exported network sees in pictures",
    "bench": "time and memory that skipping saves, against other libraries",
    "inspect": "what can be skipped in a model, and what that saves",
    "recipes": "the published results that can be reproduced",
}
MODULES = {"compare": "train", "eval": "train", "predict": "export", "recipes": "train"}
"""The module of each command that does not have a module of its own name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    os.environ.setdefault("GOMP_SPINCOUNT", spin_count())  # before PyTorch is loaded
    unprintable = ("strict", "surrogateescape")  # the latter is the default for LC_ALL=C
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in unprintable:
        sys.stdout.reconfigure(errors="replace")  # for encodings that have no arrows
    try:
        code = _exit_code(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except StochasticDepthError as error:
        print(f"error: {escaped(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        _discard_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is not None:  # it is not of an output
            raise
        _discard_output()
        print(f"error: the output cannot be written: {reason(error)}", file=sys.stderr)
        return 1


def _discard_output() -> None:
    """Discard what is still to be printed, which would fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_code(arguments: list[str]) -> int:
    try:
        return _interruptible(arguments)
    except SystemExit as exit:  # the parser has said what is wrong, or printed help
        if isinstance(exit.__context__, BrokenPipeError):  # how rich ends when its output is closed
            return 128 + signal.SIGPIPE
        return int(exit.code or 0)


def spin_count() -> str:
    """How often OpenMP threads that wait look again before they release their core.

    By default they look for milliseconds, in which another program on that core has to wait too.
    This is 0.05 to 0.15 ms: an Intel processor pauses for 140 cycles between two looks, others for
    about 50. docs/results/speed.md has what it does on a busy machine.
    """
    try:
        with open("/proc/cpuinfo") as file:
            return "1000" if "GenuineIntel" in file.read(200) else "10000"
    except OSError:
        return "10000"


def _interruptible(arguments: list[str]) -> int:
    with _interrupts() as pressed:
        try:
            return _run(arguments)
        except BaseException:
            if not pressed:
                raise
            return 128 + signal.SIGINT


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """While entered, Ctrl-C raises KeyboardInterrupt and is recorded in the list.

    The exception alone is not enough, because a library that is just being imported may catch it
    and raise another one.
    """
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    # A background process may ignore the signal, and only the main thread can set a handler.
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or not _in_main_thread():
        yield pressed
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        from stochastic_depth import __version__

        print(f"stochastic-depth {__version__}")
        return 0
    for module in ("tyro", "rich", "safetensors"):
        require(module, "train")
    from stochastic_depth.cli.arguments import choose

    about = "Deep networks with stochastic depth (Huang et al. 2016)."
    command, rest = choose("stochastic-depth", about, "command", COMMANDS, arguments)
    module = importlib.import_module(f"stochastic_depth.cli.{MODULES.get(command, command)}")
    return getattr(module, command)(rest)
