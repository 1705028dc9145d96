"""Into which published architectures can p_l be folded? python tools/fold_models.py --out FILE

Each architecture of coverage_models.py that can be made skippable is built without trained weights,
its zeros and layer scales replaced by random numbers, applied and folded. Told are the largest
differences of the outputs, in float64 and in float32, relative to the largest output; and why not,
where a block cannot take p_l exactly.
"""

import argparse
import collections
import copy
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from coverage_models import architectures
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import stochastic_depth as sd
from stochastic_depth.deploy.tracing import Trace
from stochastic_depth.models.published import published
from stochastic_depth.surgery.find import caller


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
    reason: str = ""


def judge(library: str, name: str, **options: Any) -> Parity:
    torch.manual_seed(0)
    model, example = published(f"{library}/{name}", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_()
    try:
        depth = sd.apply(model, sd.LinearDecay(0.5), example=example)
    except sd.ApplyError:
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
            pairs = zip(before, _outputs(mine, given), strict=True)
            differences.append(max(_difference(old, new) for old, new in pairs))
    except sd.FoldError as error:
        return Parity(library, name, len(depth.blocks), "refused", reason=str(error))
    single = _computes_in_single(copy.deepcopy(model).double().eval(), _as(torch.float64, example))
    return Parity(library, name, len(depth.blocks), "folded", single, *differences)


def _as(dtype: torch.dtype, example: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, example)


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad():
        leaves = tree_leaves(caller(model, example)())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _difference(old: Tensor, new: Tensor) -> float:
    return ((new - old).abs().max() / old.abs().max().clamp(min=1e-30)).item()


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
    columns = ("skippable", "folded", "refused", "float64", "float64*", "float32")
    for column in ("library", *columns):
        table.add_column(column, justify="left" if column == "library" else "right")
    for library in dict.fromkeys(p.library for p in parities):
        mine = [p for p in parities if p.library == library]
        counts = collections.Counter(p.verdict for p in mine)
        folded = [p for p in mine if p.verdict == "folded"]
        table.add_row(
            library,
            str(counts["folded"] + counts["refused"]),
            str(counts["folded"]),
            str(counts["refused"]),
            f"{max((p.float64 for p in folded if not p.single), default=0):.0e}",
            f"{max((p.float64 for p in folded if p.single), default=0):.0e}",
            f"{max((p.float32 for p in folded), default=0):.0e}",
        )
    console = Console()
    console.print(table)
    console.print("* of models that compute in single precision on the way, whatever their own")
    for p in parities:
        if p.verdict == "refused":
            console.print(f"{p.library}/{p.architecture}: {p.reason}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="library/architecture, or a library")
    parser.add_argument("--out", type=Path, help="write the verdicts as JSON here")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    parities = []
    for library, name, options in architectures():
        if asked.only and not {library, f"{library}/{name}"} & set(asked.only):
            continue
        try:
            parities.append(judge(library, name, **options))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            parities.append(Parity(library, name, 0, "broken", reason=reason))
        p = parities[-1]
        print(
            f"{p.library:12} {p.architecture:32} {p.verdict:13} {p.blocks:3} {p.float64:.0e}"
            f"{'*' if p.single else ' '} {p.float32:.0e} {p.reason[:300]}",
            flush=True,
        )
    report(parities)
    if asked.out:
        asked.out.write_text(json.dumps([asdict(p) for p in parities], indent=1) + "\n")


if __name__ == "__main__":
    main()
