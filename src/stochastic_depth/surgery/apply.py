"""`sd.apply`: make the residual blocks of a model skippable, and prove it."""

import warnings
from collections.abc import Container, Sequence
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stochastic_depth.block import ParameterOwners, Routes
from stochastic_depth.choices import Closed, GateKind, Granularity, Scale, SkippedPolicy
from stochastic_depth.draw import integer
from stochastic_depth.errors import ApplyError, SurvivalError
from stochastic_depth.gate_settings import GateSettings, require_choice
from stochastic_depth.handle import Handle
from stochastic_depth.hooks import ForwardHooks
from stochastic_depth.numbers import real_number
from stochastic_depth.schedules import Schedule
from stochastic_depth.surgery.applied import Applied, store_applied
from stochastic_depth.surgery.blocks import FoundBlock
from stochastic_depth.surgery.droppath import own_rates
from stochastic_depth.surgery.example import Example
from stochastic_depth.surgery.find.find_blocks import Found, find_blocks, find_residuals
from stochastic_depth.surgery.make_skippable import Skippable, make_skippable
from stochastic_depth.surgery.refuse import refuse
from stochastic_depth.surgery.select_modules import ModuleSelector, select_modules
from stochastic_depth.survival import (
    LinearDecay,
    Probabilities,
    StepDependent,
    Survival,
    probabilities_of,
)
from stochastic_depth.torch_private import uncompiled


@uncompiled()
def apply(
    model: nn.Module,
    survival: Survival | Literal["own"] | None = None,
    *,
    drop_rate: float | None = None,
    schedule: Schedule | None = None,
    example: Example | None = None,
    include: ModuleSelector | None = None,
    exclude: ModuleSelector | None = (),
    granularity: Granularity = "block",
    stacks: str | Sequence[str] = (),
    gate: GateKind = "batch",
    balance: bool = False,
    min_samples: int = 0,
    multiple_of: int = 1,
    closed: Closed = "skipped",
    scale: Scale | None = None,
    skipped: SkippedPolicy = "paper",
    seed: int = 0,
    budget: float | None = None,
) -> Handle:
    """Make the residual blocks of `model` skippable, in place.

    The training loop does not change: a hook draws the gates whenever `model` is called in training
    mode. Parameter names, `state_dict` keys and classes (for `isinstance`) do not change.

    With an `example`, the residual blocks of any model are found by recording one forward pass.
    They are changed so that a closed block skips all of its branch, and the result is proved. With
    every gate open, the outputs equal the original's bit for bit. Several sets of blocks are
    closed, such that for any two blocks some set closes the first and not the second; the outputs
    equal those of the original model in which the additions of these blocks return their shortcut.
    This holds in evaluation and in training mode, and training steps work. The proof needs memory
    for one to two more copies of the parameters and buffers. A model that is built from
    `sd.Residual` units needs no example.

    Drop paths inside the blocks (of timm, torchvision or transformers) and the layerdrop of
    transformers are set to rate 0 until `sd.remove`, because stochastic depth replaces them.

    Args:
        model: the model that holds residual blocks.
        survival: the survival probabilities p_l. Either a rule, by default `sd.LinearDecay(0.5)`;
            or a sequence of L probabilities; or a mapping from the names of blocks to
            probabilities, in which blocks that are not named have 1; or a function of (block,
            blocks, step); or "own": 1 minus the rate of each block's own drop path.
        drop_rate: the drop rate 1 - p_L of the last block under linear decay, as other libraries
            count. It is given in place of `survival`.
        schedule: how drop rates change over the training steps: `sd.Warmup(1000)`,
            `sd.Early(1000)`, or any function of the step that returns the share of the drop rates
            that is in force, from 0 to 1.
        example: the inputs of one forward call: a tensor, a tuple of arguments, or a mapping of
            keyword arguments. A small batch is enough.
        include: the modules in which to look for blocks: their names, their classes, the modules
            themselves, or a function of name and module that returns a bool. By default the whole
            model.
        exclude: modules to leave unchanged, with everything inside them. A block that has one of
            them in its branch is never skipped.
        granularity: "block" throws one coin for all residual additions of a repeated block (an
            element of a list of modules of one class, or one iteration of a loop), and one for each
            addition that the model's own forward method makes. "unit" throws one coin for each
            addition.
        stacks: names of modules, such as ("encoder", "decoder"). The rule counts l and L from 1 in
            each of them. By default the whole model is one stack.
        gate: "batch" throws one coin for each block and mini-batch (the paper): a closed block
            costs nothing. "sample" throws one coin for each block and sample, and masks the branch,
            as the DropPath of timm and torchvision does: it saves nothing. "subset" throws the same
            coins and runs the branch on the drawn samples only: it saves in proportion, and
            BatchNorm in the branch sees no other samples.
        balance: whether the amount of work is the same in every step. With the "batch" gate, the
            number of open blocks is the floor or the ceiling of the sum of p_l, and each block is
            still open with probability p_l: step time and peak memory become those of the expected
            depth. With the other gates, each block with p_l > 0 gets round(p_l * batch) samples,
            and at least one: shapes do not change from step to step. In a small batch that is
            another share of the samples than p_l. scale="training" divides by this share, and is
            unbiased; scale="inference" is not, and warns if the two differ by more than 5 %.
        min_samples: with the "subset" gate, the smallest number of samples in a subset (BatchNorm
            needs two). Where p_l * batch is not much larger, blocks run on a larger share of the
            samples than p_l, with the same consequence.
        multiple_of: with balanced subsets, their size is rounded to a multiple of this, such as 8.
        closed: what a closed block saves. "skipped" saves all of its branch (the paper).
            "forward-only" runs the branch and adds it without its autograd graph, and saves only
            its backward pass and its memory (DropBP, arXiv:2402.17812). Training and evaluation
            then compute the same function, which suits fine-tuning.
        scale: "inference" multiplies by p_l in evaluation (the paper), which fits weights that are
            trained from scratch. "training" divides by p_l in training, as timm and torchvision do,
            and evaluates weights that were trained at constant depth unchanged. By default it is
            "training" with `drop_rate` and with "own", and "inference" otherwise. With
            closed="forward-only" nothing is scaled.
        skipped: the gradient of the parameters of a skipped block. "paper" makes it zero, so that
            momentum and weight decay still move the parameters. "freeze" leaves it None, so that
            the optimizer leaves them alone.
        seed: chooses the sequence of gates.
        budget: about how many seconds the proof may take. When they are over, no further set of
            blocks is closed; the first set, all blocks, is always tried in both modes. By default
            all sets are tried, and the number of passes grows with log2 L.

    Returns:
        The handle: probabilities, gates, and the state for checkpoints. Blocks are numbered in the
        order in which they run on `example`, or without an example in order of registration.

    Warns:
        UserWarning: when the normalisation layers look trained and `scale` is "inference" by
            default. Weights that were trained at constant depth evaluate worse under it.

    Raises:
        ApplyError: when an argument has an unknown value or conflicts with another; when `include`
            or `exclude` matches no module; or when `model` has no residual block, has stochastic
            depth already, or is wrapped, traced or compiled already.
        ExampleError: when `model` does not run on `example`.
        UnsupportedBlockError: when a block cannot be made skippable; `model` is then as it was
            before.
        SurvivalError: when a p_l is outside (0, 1], or `drop_rate` outside [0, 1).
        GateError: when `seed` is not an integer.

    Examples:
        >>> model = sd.models.CifarResNet(20)
        >>> sd.apply(model, sd.LinearDecay(0.5)).expected_depth  # of 9 blocks
        6.5

        Any model, found on an example:

        >>> layer = nn.TransformerEncoderLayer(16, 2, batch_first=True)
        >>> encoder = nn.TransformerEncoder(layer, 4)
        >>> sd.apply(encoder, drop_rate=0.1, example=torch.randn(2, 5, 16)).survival
        (0.975, 0.95, 0.925, 0.9)
    """
    require_choice("granularity", granularity, get_args(Granularity))
    survival = asked_survival(survival, drop_rate)
    settings = GateSettings(
        gate=gate,
        scale=_scale(scale, closed, as_drop_path=drop_rate is not None or survival == "own"),
        skipped=skipped,
        min_samples=min_samples,
        balance=balance,
        multiple_of=multiple_of,
        closed=closed,
    )
    seed = integer("seed", seed)
    if budget is not None and real_number(budget) is None:
        raise ApplyError(f"budget={budget!r}: give the seconds of the proof, or None for no limit")
    refuse(model, example)
    selected = select_modules(model, include, exclude)

    def find(defer: Container[str], granularity: Granularity = granularity) -> Found:
        if example is None:
            return find_residuals(model, selected)
        return find_blocks(model, example, granularity, selected, defer=defer, count_flops=False)

    made = make_skippable(
        model,
        find,
        lambda found: survival_of_blocks(survival, model, found, stacks, schedule),
        find_whole=partial(find, granularity="block") if granularity == "unit" else None,
        example=example,
        gate=gate,
        scale=settings.scale,
        budget=budget,
    )
    handle = Handle(made.proved.blocks, made.probabilities, settings, seed)
    hooks = _hooks(model, handle, made)
    store_applied(model, Applied(handle, made.found, hooks, made.changed_settings))
    drops = isinstance(made.probabilities, StepDependent) or min(made.probabilities.full) < 1
    if scale is None and settings.scale == "inference" and drops and look_trained(model):
        warnings.warn(TRAINED, stacklevel=2)  # last, because it may be raised as an error
    return handle


def _scale(scale: Scale | None, closed: Closed, as_drop_path: bool) -> Scale:
    """Where the expectation is corrected, by default.

    Args:
        as_drop_path: whether survival is given as in other libraries, which divide by p_l.
    """
    if scale is not None:
        return scale
    if closed == "forward-only":
        return "none"
    return "training" if as_drop_path else "inference"


def _hooks(model: nn.Module, handle: Handle, made: Skippable) -> tuple[RemovableHandle, ...]:
    """Register the hooks that draw gates and that reset attributes which branches set."""
    owners = ParameterOwners(model)
    shared = tuple((route, owners.of(names)) for route, names in made.routes.parameters)
    hooks = ForwardHooks(model, handle, Routes(made.routes.blocks, shared))
    resets = made.proved.resets
    return (
        model.register_forward_pre_hook(hooks.before_forward, with_kwargs=True),
        model.register_forward_hook(hooks.after_forward, always_call=True),
        *([model.register_forward_pre_hook(ResetAttributes(resets))] if resets else ()),
    )


TRAINED = (
    "the weights look trained, and evaluation will multiply each branch by p_l, which they may not "
    'have been trained for: give scale="training" to fine-tune weights of constant depth, or '
    'scale="inference" if they were trained with stochastic depth'
)


def look_trained(model: nn.Module) -> bool:
    """Whether a normalisation layer of `model` has statistics or uneven weights."""
    for module in model.modules():
        if "Norm" not in type(module).__name__:
            continue
        seen, weight = getattr(module, "num_batches_tracked", None), getattr(module, "weight", None)
        if isinstance(seen, Tensor) and not seen.is_meta and seen > 0:
            return True
        if isinstance(weight, Tensor) and not weight.is_meta and weight.numel() > 0:
            low, high = weight.detach().aminmax()
            if low != high:
                return True
    return False


def asked_survival(
    survival: Survival | Literal["own"] | None, drop_rate: float | None
) -> Survival | Literal["own"]:
    """What the arguments `survival` and `drop_rate` ask for.

    Raises:
        ApplyError: when both are given.
        SurvivalError: when `drop_rate` is not a number, at least 0 and below 1.
    """
    if drop_rate is None:
        if survival is None:
            return LinearDecay()
        as_list: Any = getattr(survival, "tolist", None)  # of a NumPy array, or a tensor
        return survival if as_list is None else as_list()
    if survival is not None:
        raise ApplyError(
            f"drop_rate={drop_rate} and survival={survival!r}: give one of them, not both"
        )
    rate = real_number(drop_rate)
    if rate is None or not 0 <= rate < 1:
        raise SurvivalError(f"drop_rate={drop_rate!r}: it must be a number, at least 0 and below 1")
    return LinearDecay(1 - rate)


class ResetAttributes:
    """A hook on the model that resets attributes which branches set on their modules.

    An example is the balancing loss that a mixture of experts stores for the training loop. Without
    the reset, a closed branch would keep the loss of an earlier step.
    """

    def __init__(self, first: dict[str, Any]) -> None:
        self.first = first
        """The value before any forward pass, by name of module and attribute."""

    def __call__(self, model: nn.Module, args: tuple) -> None:
        if model.training:
            for path, value in self.first.items():
                name, _, attribute = path.rpartition(".")
                setattr(model.get_submodule(name), attribute, value)


def survival_of_blocks(
    survival: Survival | Literal["own"],
    model: nn.Module,
    found: Sequence[FoundBlock],
    stacks: str | Sequence[str],
    schedule: Schedule | None = None,
) -> Probabilities:
    """(p_1, ..., p_L) over time, from any of the forms of `survival` that `sd.apply` accepts."""
    names = [block.name for block in found]
    if survival == "own":
        survival = [1 - rate for rate in own_rates(model, found)]
    return probabilities_of(survival, names, stacks, schedule)
