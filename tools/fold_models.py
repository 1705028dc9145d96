"""Into which published architectures can p_l be folded? python tools/fold_models.py --out FILE

Each model of timm, torchvision and transformers in `coverage_builders` that can be made skippable
is built without trained weights, its zeros and layer scales replaced by random numbers, applied and
folded. Told are the
largest differences of the outputs, in float64 and in float32, relative to the largest output; and
why not, where a block cannot take p_l exactly. The last bit: by how much the outputs in float32
differ when nothing is folded and every weight becomes a neighbouring number, which is the model's
own noise.
"""

import argparse
import collections
import copy
import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from coverage_builders import BUILDERS, Build
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import stochastic_depth as sd
from stochastic_depth.export.exponents import Trace
from stochastic_depth.extras import import_torchvision
from stochastic_depth.surgery.example import caller

import_torchvision()  # before libraries that need it
LIBRARIES = "torchvision", "timm", "transformers"


@dataclass(frozen=True)
class Parity:
    """What came of one architecture."""

    library: str
    architecture: str
    blocks: int
    verdict: str
    """folded, refused, or not skippable."""
    single: bool = False
    """Whether the model computes in single precision on the way, whatever its own."""
    float64: float = 0.0
    float32: float = 0.0
    last_bit: float = 0.0
    """In float32, not folded, when every weight becomes a neighbouring number."""
    reason: str = ""


def judge(library: str, name: str, build: Build) -> Parity:
    torch.manual_seed(0)
    model, example = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_()
    try:
        handle = sd.apply(model, sd.LinearDecay(0.5), example=example)
    except sd.errors.ApplyError:
        return Parity(library, name, 0, "not skippable")
    differences = []
    try:
        for dtype in (torch.float64, torch.float32):
            mine, given = copy.deepcopy(model).to(dtype).eval(), _as(dtype, example)
            try:
                before = _outputs(mine, given)
            except RuntimeError:  # some of its operations are not made for float64
                differences.append(0.0)
                continue
            sd.fold(mine, given)
            differences.append(_difference(before, _outputs(mine, given)))
    except sd.errors.FoldError as error:
        return Parity(library, name, len(handle.blocks), "refused", reason=str(error))
    single = _computes_in_single(copy.deepcopy(model).double().eval(), _as(torch.float64, example))
    differences.append(_difference(before, _outputs(_neighbour(model.eval()), example)))
    return Parity(library, name, len(handle.blocks), "folded", single, *differences)


def _as(dtype: torch.dtype, example: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, example)


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad():
        leaves = tree_leaves(caller(model, example)())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest, relative to the largest value of each output."""
    pairs = zip(before, after, strict=True)
    return max(
        ((new - old).abs().max() / old.abs().max().clamp(min=1e-30)).item() for old, new in pairs
    )


def _neighbour(model: nn.Module) -> nn.Module:
    """A copy, each of whose weights is the next number up or down, by chance."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            up_or_down = torch.full_like(weight, torch.inf).copysign(torch.randn_like(weight))
            weight.copy_(weight.nextafter(up_or_down))
    return model


def _computes_in_single(model: nn.Module, example: Any) -> bool:
    try:
        with torch.no_grad(), Trace(model, []) as trace:
            caller(model, example)()
    except RuntimeError:
        return True
    return trace.single


def report(parities: list[Parity]) -> None:
    """How many by library, and the largest differences."""
    table = Table(title="p_l folded into the weights", title_justify="left")
    for column in ("library", "folded", "float64", "float64*", "float32", "last bit"):
        table.add_column(column, justify="left" if column == "library" else "right")
    for library in dict.fromkeys(p.library for p in parities):
        mine = [p for p in parities if p.library == library]
        counts = collections.Counter(p.verdict for p in mine)
        folded = [p for p in mine if p.verdict == "folded"]
        table.add_row(
            library,
            f"{counts['folded']} of {counts['folded'] + counts['refused']}",
            _largest(p.float64 for p in folded if not p.single),
            _largest(p.float64 for p in folded if p.single),
            _largest(p.float32 for p in folded),
            _largest(p.last_bit for p in folded),
        )
    console = Console()
    console.print(table)
    console.print("* of models that compute in single precision on the way, whatever their own")
    for p in parities:
        if p.verdict == "refused":
            console.print(f"{p.library}/{p.architecture}: {p.reason}", markup=False)


def _largest(differences: Iterable[float]) -> str:
    return f"{max(differences, default=0):.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="library/architecture, or a library")
    parser.add_argument("--out", type=Path, help="write the verdicts as JSON here")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    parities = []
    models = ((library, *model) for library in LIBRARIES for model in BUILDERS[library]())
    for library, name, build in models:
        if asked.only and not {library, f"{library}/{name}"} & set(asked.only):
            continue
        try:
            parities.append(judge(library, name, build))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            parities.append(Parity(library, name, 0, "broken", reason=reason))
        p = parities[-1]
        print(
            f"{p.library:12} {p.architecture:32} {p.verdict:13} {p.blocks:3} {p.float64:.0e}"
            f"{'*' if p.single else ' '} {p.float32:.0e} {p.last_bit:.0e} {p.reason[:300]}",
            flush=True,
        )
    report(parities)
    if asked.out:
        asked.out.write_text(json.dumps([asdict(p) for p in parities], indent=1) + "\n")


if __name__ == "__main__":
    main()
