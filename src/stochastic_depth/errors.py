"""All errors that this library raises on purpose, as one tree of classes; and a warning."""

import pathlib
import sysconfig
import traceback


class StochasticDepthError(Exception):
    """The root of the tree: `except sd.errors.StochasticDepthError` catches all of them."""


class SurvivalError(StochasticDepthError, ValueError):
    """A survival probability outside (0, 1], or a rule that cannot give one."""


class GateError(StochasticDepthError, ValueError):
    """Gates that do not fit the model, the mini-batch or the call; or that are not drawn."""


class AdditionNotReachedError(GateError):
    """A pass that does not make the addition of a closed block, as the example did."""

    block: str = ""
    """The name of the block."""


class ApplyError(StochasticDepthError, ValueError):
    """A model to which a function cannot be applied, or an argument that does not fit it."""


class ExampleError(ApplyError):
    """An example on which the model does not run; the cause is the model's own error."""


class UnsupportedBlockError(ApplyError):
    """A residual block that cannot be made skippable; names it, the reason and the remedies."""

    def __init__(self, message: str, blocks: tuple[str, ...] = (), of_model: bool = False) -> None:
        super().__init__(message)
        self.blocks = blocks
        """The names of the blocks that the error is about, if they are known."""
        self.of_model = of_model
        """Whether the error is about the whole model, so that no other mechanism would help."""


class FoldError(ApplyError):
    """A block whose p_l cannot be multiplied into its weights exactly; names it and the reason."""


class TruncateError(ApplyError):
    """A choice of blocks that does not fit the model, or a block that cannot be removed."""


class StateError(StochasticDepthError, ValueError):
    """A `state_dict` of gates of a different model or of different settings."""


class MissingExtraError(StochasticDepthError, ImportError):
    """An optional dependency that is not installed."""


class ConfigError(StochasticDepthError, ValueError):
    """A configuration that cannot be trained; names the field, its value and the remedy."""


class EngineError(StochasticDepthError, ValueError):
    """A training step that an engine cannot take; names the obstacle and an engine that can."""


class DataError(StochasticDepthError, ValueError):
    """A data file that is missing, truncated, mislabelled or not of the expected format."""


class ExportError(StochasticDepthError, ValueError):
    """An exported network that cannot be written, read or trusted; names the file, and why."""


class RunError(StochasticDepthError):
    """A run folder that is missing, in use, or of a different run."""


class CheckpointError(RunError):
    """A checkpoint that could not be written, or cannot be trusted."""


class OutOfMemoryError(RunError):
    """A training step that ran out of memory; names the step, its gates and the remedies.

    Or a process that decodes pictures and has died, which is usually for lack of memory.
    """


class DivergedError(RunError):
    """A loss or a weight that is not finite."""


class Interrupted(StochasticDepthError):
    """A signal that has stopped a run, with a checkpoint or in the middle of a step."""

    def __init__(
        self, run: pathlib.Path, step: int, signal: int, has_checkpoint: bool = True
    ) -> None:
        how = "with a checkpoint"
        if not has_checkpoint:
            how = "in the middle of a step: the work since the last checkpoint will be repeated"
        super().__init__(f"{run} stopped at step {step}, {how}")
        self.run, self.signal = run, signal


class BypassedAdditionWarning(UserWarning):
    """A pass that bypasses the addition of a block, which is then neither skipped nor scaled."""


def first_line(error: BaseException) -> str:
    """The first line of the message of any error, for a sentence that reports it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given"


def place_of(error: BaseException) -> str:
    """The file and line at which an error was raised, for a sentence that reports it.

    They are those of the user's code, if it has called the library that raised the error.
    """
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}, line {error.lineno}"
    calls = [call for call in traceback.extract_tb(error.__traceback__) if call.filename[0] != "<"]
    paths = sysconfig.get_paths()
    others = str(pathlib.Path(__file__).parent), paths["stdlib"], paths["purelib"], paths["platlib"]
    last = ([call for call in calls if not call.filename.startswith(others)] or calls)[-1]
    return f"{last.filename}, line {last.lineno}"


_SIGNS_OF_EXHAUSTION = (
    "out of memory",  # CUDA
    "can't allocate memory",  # PyTorch's allocator on a CPU
    "could not create a memory",  # oneDNN
    "Cannot allocate memory",  # the operating system, when a loader starts its workers
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is exhausted in this process."""
    return isinstance(error, MemoryError) or any(
        sign in str(error) for sign in _SIGNS_OF_EXHAUSTION
    )
