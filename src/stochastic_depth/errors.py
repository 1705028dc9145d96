"""Every error this library raises on purpose, in one tree."""


class StochasticDepthError(Exception):
    """The root: `except sd.StochasticDepthError` catches all that follows."""


class SurvivalError(StochasticDepthError, ValueError):
    """A survival probability outside (0, 1], or a rule that cannot give one."""


class GateError(StochasticDepthError, ValueError):
    """Gates that do not fit the model: never drawn, or drawn for another batch."""


class UnmetError(GateError):
    """A pass that never reaches the addition of a closed block, which the example reached."""


class ApplyError(StochasticDepthError, ValueError):
    """A model in which nothing can be skipped, or that is skippable already."""


class ExampleError(ApplyError):
    """An example that the model does not run on; the model's own error is its cause."""


class UnsupportedBlockError(ApplyError):
    """A residual unit that cannot be made skippable; names it, why, and the remedies."""

    blocks: tuple[str, ...] = ()
    """The names of the blocks that are meant, where they are known."""
    of_model: bool = False
    """Whether it is about the model: no other way of skipping its blocks would help."""


class FoldError(ApplyError):
    """A block whose p_l cannot be multiplied into its weights exactly; names it and why."""


class TruncateError(ApplyError):
    """A choice of blocks that does not fit the model, or a block that cannot be taken out."""


class StateError(StochasticDepthError, ValueError):
    """A `state_dict` of the gates that belongs to another model or setting."""


class MissingExtraError(StochasticDepthError, ImportError):
    """An optional dependency that is not installed."""


class ConfigError(StochasticDepthError, ValueError):
    """A configuration that cannot be trained; names the field, its value and the remedy."""


class EngineError(StochasticDepthError, ValueError):
    """A training step that an engine cannot take; names what is in the way and another engine."""


class DataError(StochasticDepthError, ValueError):
    """A data file that is missing, truncated, mislabelled or foreign."""


class ExportError(StochasticDepthError, ValueError):
    """An exported network that cannot be written, read or trusted; names the file and why."""


class RunError(StochasticDepthError):
    """A run folder that is missing, taken, in use, or not of this run."""


class CheckpointError(RunError):
    """A checkpoint that could not be written, or cannot be trusted."""


class OutOfMemoryError(RunError):
    """A step that needs more memory than there is; names the step, its gates and remedies."""


class DivergedError(RunError):
    """A loss or a weight that is not finite."""
