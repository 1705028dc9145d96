"""Which models that people train can be made skippable: make coverage-models.

Each model of `coverage_builders` is built small and without trained weights, applied, and held
against `coverage_oracle`, an own account of its residual additions: all blocks closed, every
other one and a random half, in evaluation and in training, outputs and gradients. A refusal's
advice is followed as it stands. A process for each model, and one line of JSON; what is in the file
is not tried again.

    python tools/coverage_models.py --out FILE [--library timm ...] [--only NAME ...]
    python tools/coverage_models.py --out FILE --drawn   # the models that were set aside
    python tools/coverage_models.py --out FILE --report --summary SMALL-FILE
"""

import argparse
import ast
import collections
import contextlib
import copy
import json
import multiprocessing
import os
import re
import resource
import signal
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "YOLO_CONFIG_DIR": "/tmp", "TOKENIZERS_PARALLELISM": "false"}

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

if torch.version.cuda is None:  # torchvision's wheels miss two operators on a CPU build of torch
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from coverage_builders import BUILDERS, drawn
from coverage_oracle import Watch, counted, matched, missed, tensors, within

import stochastic_depth as sd
from stochastic_depth.surgery.applied import applied_to

SECONDS, WALL, BYTES = 120, 900, 6 << 30
"""What one model may take: seconds of processor time and of the clock, and memory."""
PROCESSES = multiprocessing.get_context("fork")
TOLERANCE = 1e-4
VERDICTS = ("complete", "refused", "missed", "wrong", "slow", "not residual", "unbuilt")

Build = Callable[[], tuple[nn.Module, Any]]


class TooLong(BaseException):
    pass


def call(model: nn.Module, example: Any, watch: Watch, gradients: bool) -> list[Any]:
    """Outputs, and for training the gradients of all parameters."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = None
    with torch.set_grad_enabled(gradients), watch:
        if isinstance(example, dict):
            out = model(**example)
        else:
            out = model(*example) if isinstance(example, tuple) else model(example)
    outputs = tensors(out)
    if gradients:
        total = [o.float().square().mean() for o in outputs if o.requires_grad]
        if total:
            torch.stack(total).sum().backward()
        outputs += [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [o.detach().clone() for o in outputs]


def undropped(model: nn.Module) -> None:
    """Set all rates of dropout to 0: a closed branch draws no random numbers."""
    for module in model.modules():
        for name, value in vars(module).items():
            kind = type(module).__name__
            is_rate = "drop" in name or (name == "p" and ("Drop" in kind or "Depth" in kind))
            if is_rate and isinstance(value, float):
                setattr(module, name, 0.0)


def differs(one: list[Any], other: list[Any]) -> str:
    """How two lists of tensors differ; empty if they do not."""
    if [o.shape for o in one] != [o.shape for o in other]:
        return "other shapes"
    scale = max((float(o.abs().max()) for o in one if o.numel()), default=0.0)
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel() and a.dtype.is_floating_point | a.dtype.is_complex:
            same = (a == b) | (a.isnan() & b.isnan())
            if not same.all():
                worst = max(worst, float((a - b)[~same].abs().nan_to_num(9e9).max()))
    return f"{worst / max(scale, 1e-30):.1g}" if worst > TOLERANCE * scale else ""


def oracle(original: nn.Module, model: nn.Module, handle: Any, example: Any) -> tuple[str, int]:
    """What the own account finds wrong, and how many additions it knows that no block has."""
    torch.backends.mha.set_fastpath_enabled(False)
    undropped(original)
    undropped(model)
    found = applied_to(model).found
    blocks = [(f.name, set(f.modules), max(1, len(f.units))) for f in found]
    size, count = len(found), 0
    torch.manual_seed(1)
    patterns = [[True] * size, [False] * size, [n % 2 == 0 for n in range(size)]]
    patterns.append((torch.rand(size) < 0.5).tolist())
    state = copy.deepcopy(original.state_dict())
    model.load_state_dict(state)
    for train in (False, True):
        original.train(train), model.train(train)
        watch = Watch(model=original)
        with within(watch, original):
            call(original, example, watch, train)
        mine = matched(watch.found(), blocks)
        if not train:
            count = len(missed(watch.found(), [a for block in mine for a in block]))
        lost = [f.name for f, additions in zip(found, mine, strict=True) if not additions]
        if lost:
            return f"unmatched: {len(lost)} blocks, {lost[0]!r} first", count
        original.load_state_dict(state)
        usual = call(original, example, Watch(), train)
        original.load_state_dict(state)
        if differs(usual, call(original, example, Watch(), train)):
            continue  # not a function of its input
        for gates in patterns if size > 1 else patterns[:2]:
            shut = [a for block, o in zip(mine, gates, strict=True) if not o for a in block]
            original.load_state_dict(state)
            model.load_state_dict(state)
            right = call(original, example, Watch({a.number: a.side for a in shut}), train)
            with handle.forced(gates), counted(model) as calls:
                got = call(model, example, Watch(), train)
            if why := differs(right, got):
                where = "training" if train else "evaluation"
                return f"{where}, {gates.count(False)} of {size} closed: {why}", count
            if not any(gates):
                own = watch.alone(shut)
                called = sorted(name for name in own if calls[name])
                if len(called) * 2 > len(own):
                    return f"runs closed: {len(called)} of {len(own)} modules, {called[0]}", count
    original.load_state_dict(state)
    return "", count


def judge(library: str, name: str, build: Build, is_built: Callable[[], None]) -> dict[str, Any]:
    """What comes of one model; `is_built` is called when it is there."""
    result: dict[str, Any] = {"library": library, "model": name}
    began = time.process_time()
    torch.manual_seed(0)
    try:
        original, example = build()
        torch.manual_seed(0)
        model, _ = build()
        model.load_state_dict(original.state_dict())
        call(original.eval(), example, Watch(), False)
    except Exception as error:
        return {**result, "verdict": "unbuilt", "reason": line(error)}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    is_built()
    built = time.process_time()
    exclude: list[str] = []
    try:
        handle = sd.apply(model, example=example, scale="inference")
        result["verdict"] = "complete"
    except sd.UnsupportedBlockError as error:
        result |= {"verdict": "refused", "reason": line(error)}
        handle, result["advice"] = advised(model, example, error, exclude)
    except sd.ApplyError as error:
        watch = Watch(model=original.eval())
        with within(watch, original):
            call(original, example, watch, True)
        count = len(missed(watch.found(), []))
        verdict = "missed" if count else "not residual"
        result |= {"verdict": verdict, "reason": line(error), "missed": count}
        handle = None
    except Exception as error:
        return {**result, "verdict": "wrong", "reason": line(error)}
    result["apply_seconds"] = round(time.process_time() - built, 2)
    if handle is not None:
        found = applied_to(model).found
        result["blocks"] = len(found)
        result["mechanisms"] = ", ".join(sorted({block.mechanism for block in found}))
        try:
            wrong, count = oracle(original, model, handle, example)
        except Exception as error:
            wrong, count = line(error), 0
        if wrong:
            result |= {"verdict": "wrong", "reason": wrong}
        elif count and not exclude:
            result |= {"verdict": "missed", "missed": count}
        sd.remove(model)
    return {**result, "seconds": round(time.process_time() - began, 2)}


def advised(
    model: nn.Module, example: Any, error: Exception, exclude: list[str]
) -> tuple[Any, str]:
    """Follow the advice of refusals until one of them works: exclude= what they name."""
    for _ in range(40):
        found = re.search(r"exclude=(\[.*?\])", str(error)) or re.search(
            r"exclude= leaves blocks as they are, say ('[^']*')", str(error)
        )
        if not found:
            return None, f"none that can be followed, after {exclude}"
        named = ast.literal_eval(found[1])
        exclude += [named] if isinstance(named, str) else named
        try:
            return sd.apply(model, example=example, scale="inference", exclude=exclude), "works"
        except sd.UnsupportedBlockError as again:
            error = again
        except sd.ApplyError:
            return None, f"nothing is left without {exclude}"
    return None, "does not end"


def line(error: BaseException) -> str:
    kind = "" if isinstance(error, sd.StochasticDepthError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:600]


def work(library: str, name: str, build: Build, out: Connection) -> None:
    """In a process of its own: judge a model, and send when it is built and what comes of it."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)

    def stop(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        result = judge(library, name, build, lambda: out.send("built"))
    except (TooLong, MemoryError) as error:
        reason = "memory" if isinstance(error, MemoryError) else f"more than {SECONDS} s"
        result = {"library": library, "model": name, "verdict": "slow", "reason": reason}
    signal.setitimer(signal.ITIMER_PROF, 0)
    out.send(result)
    os._exit(0)  # libraries leave threads behind


def run(library: str, wanted: Callable[[list[str]], list[str]], is_drawn: bool, out: Path) -> None:
    """In a process of its own, which has imported the library: judge models of it, each in another.

    Args:
        wanted: which of the models.
    """
    torch.set_num_threads(1)
    try:
        builders = dict(drawn(library) if is_drawn else BUILDERS[library]())
    except ImportError as error:
        print(f"{library} is not installed: {error}")
        return
    for name in wanted(list(builders)):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        worker = PROCESSES.Process(target=work, args=(library, name, builders[name], sender))
        worker.start()
        sender.close()
        is_built, result = False, None
        reason = f"more than {WALL} s"
        with contextlib.suppress(EOFError):
            while result is None and receiver.poll(WALL):
                message = receiver.recv()
                is_built |= message == "built"
                result = message if isinstance(message, dict) else None
        if worker.exitcode is not None or result is None:
            worker.join(1)
        if result is None:
            if worker.exitcode is None:
                worker.kill()
                verdict = "slow"
            else:
                verdict = "wrong" if is_built else "unbuilt"
                reason = f"the process ended with {worker.exitcode}"
            result = {"library": library, "model": name, "verdict": verdict, "reason": reason}
        worker.join()
        note(result, out)


def note(result: dict[str, Any], out: Path) -> None:
    with out.open("a") as file:
        file.write(json.dumps(result) + "\n")
    told = [result.get(key, "") for key in ("blocks", "mechanisms", "seconds", "reason")]
    print(f"{result['library']:14} {result['model']:32} {result['verdict']:12}", *told, flush=True)


def read(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last line of each model."""
    lines = out.read_text().splitlines() if out.exists() else []
    results = [json.loads(text) for text in lines]
    return {(result["library"], result["model"]): result for result in results}


def report(results: list[dict[str, Any]]) -> None:
    """A table by library, and each model by name that is not complete."""
    table = Table()
    for column in ("library", "tried", "residual", *VERDICTS[:5], "complete of residual"):
        table.add_column(column, justify="left" if column == "library" else "right")
    for library in [*dict.fromkeys(r["library"] for r in results), "all"]:
        counts = collections.Counter(
            r["verdict"] for r in results if library in ("all", r["library"])
        )
        residual = sum(counts[verdict] for verdict in VERDICTS[:5])
        share = f"{100 * counts['complete'] / max(1, residual):.1f} %"
        tried = residual + counts["not residual"]
        row = [tried, residual, *(counts[verdict] for verdict in VERDICTS[:5])]
        table.add_row(library, *map(str, row), share)
    Console(width=120).print(table)
    for r in results:
        if r["verdict"] not in ("complete", "not residual", "unbuilt"):
            print(f"{r['library']}/{r['model']}: {r['verdict']}: {told(r)}")


def told(result: dict[str, Any]) -> str:
    """Why a model is not complete, and what came of the advice."""
    if result["verdict"] == "missed":
        return f"{result['missed']} additions that no block has"
    advice = f" (the advice: {result['advice']})" if "advice" in result else ""
    return result["reason"].split("; exclude=")[0].split("; no other block")[0] + advice


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """By library and verdict: names, with the number of blocks or the reason."""
    of_library: dict[str, dict[str, Any]] = {}
    for r in results:
        same = of_library.setdefault(r["library"], {}).setdefault(r["verdict"], {})
        same[r["model"]] = r["blocks"] if r["verdict"] == "complete" else told(r)
    for verdicts in of_library.values():
        verdicts["not residual"] = " ".join(verdicts.get("not residual", {}))
    return of_library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each model")
    parser.add_argument("--library", nargs="+", choices=list(BUILDERS), default=list(BUILDERS))
    parser.add_argument("--only", nargs="+", help="models by name")
    parser.add_argument("--again", nargs="+", default=[], help="verdicts that are tried again")
    parser.add_argument("--sample", type=int, help="so many of each library")
    parser.add_argument("--drawn", action="store_true", help="the models that were set aside")
    parser.add_argument("--report", action="store_true", help="only the table")
    parser.add_argument("--summary", type=Path, help="what came of them, in one small file")
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    done = {} if asked.only else read(asked.out)
    for library in [] if asked.report else asked.library:

        def wanted(names: list[str], library: str = library) -> list[str]:
            names = [name for name in names if not asked.only or name in asked.only]
            known = {n: done[library, n]["verdict"] for n in names if (library, n) in done}
            step = max(1, len(names) // asked.sample) if asked.sample else 1
            return [n for n in names[::step] if known.get(n) in (None, *asked.again)]

        importing = PROCESSES.Process(target=run, args=(library, wanted, asked.drawn, asked.out))
        importing.start()
        importing.join()
    results = list(read(asked.out).values())
    report(results)
    if asked.summary:
        asked.summary.write_text(json.dumps(summary(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
