"""Which models that people train can be made skippable: make coverage-models.

Each model of `coverage_builders` is built small and without trained weights, applied, and held
against `coverage_oracle`, an own account of its residual additions: all blocks closed, every
other one and a random half, in evaluation and in training, outputs and gradients. A refusal's
advice is followed as it stands. A process for each model, one at a time, with one thread, limits of
time and memory, and one line of JSON; what is in the file is not tried again, so that a run that
was interrupted goes on. Five hours of one core of a busy machine.

    python tools/coverage_models.py --out FILE [--library timm ...] [--only NAME ...]
    python tools/coverage_models.py --out FILE --drawn   # a random draw of those that are not tried
    python tools/coverage_models.py --out FILE --report --summary SMALL-FILE
"""

import argparse
import ast
import collections
import contextlib
import copy
import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
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
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torchvision compiles what it computes of regions

import torch
from coverage_builders import BUILDERS, DRAWN, LARGE, TOO_LARGE, drawn, not_tried
from coverage_oracle import Claim, Watch, counted, matched, missed, tensors, within
from rich.console import Console
from rich.table import Table
from torch import nn

import stochastic_depth as sd
from stochastic_depth.extras import import_torchvision
from stochastic_depth.surgery.applied import applied_to

import_torchvision()  # before libraries that need it

SECONDS, WALL, BYTES = 120, 900, 6 << 30
"""What one model may take: seconds of processor time and of the clock, and memory."""
PROCESSES = multiprocessing.get_context("fork")
TOLERANCE = 1e-4
FROM = "drawn from "
"""Before the name of a library, for what was drawn last."""
PACKAGE = {
    "smp": "segmentation-models-pytorch",
    "open_clip": "open-clip-torch",
    "open_clip_small": "open-clip-torch",
    "pytorch": "torch",
}
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
    blocks = [
        Claim(
            block.name,
            frozenset(block.modules),
            max(1, len(block.units)),
            block.shortcut,
            block.mechanism == "registered",
        )
        for block in found
    ]
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
            count = len(missed(watch.found(), mine))
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
    once = called_first(original, example)
    counts = counting(model, once)
    try:
        handle = sd.apply(model, example=example, scale="inference")
        result["verdict"] = "complete"
    except sd.errors.UnsupportedBlockError as error:
        result |= {"verdict": "refused", "reason": line(error)}
        handle, result["advice"] = advised(model, example, error, exclude)
    except sd.errors.ApplyError as error:
        watch = Watch(model=original.eval())
        with within(watch, original):
            call(original, example, watch, False)
        count = len(missed(watch.found(), []))
        verdict = "missed" if count else "not residual"
        if count and "an autograd.Function" in str(error):
            verdict = "refused"  # all of its additions are in functions that know no gates
        result |= {"verdict": verdict, "reason": line(error), "missed": count}
        handle = None
    except Exception as error:
        return {**result, "verdict": "wrong", "reason": line(error)}
    result["apply_seconds"] = round(time.process_time() - built, 2)
    for name in once:
        del model.get_submodule(name).forward
    if handle is not None:
        found = applied_to(model).found
        branches = {name for block in found for name in block.modules}
        result["passes"] = max((counts[name] for name in once if name not in branches), default=0)
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


def called_first(model: nn.Module, example: Any) -> list[str]:
    """Names of the first modules without children that are called, once in a forward pass."""
    with counted(model) as calls:
        call(model.eval(), example, Watch(), False)
    once = [name for name, number in calls.items() if number == 1]
    return [name for name in once if not list(model.get_submodule(name).children())][:8]


def counting(model: nn.Module, names: list[str]) -> collections.Counter[str]:
    """How often modules are called from now on, without hooks, which some models ask for."""
    counts: collections.Counter[str] = collections.Counter()

    def forward(name: str, before: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return before(*args, **kwargs)

    for name in names:
        module = model.get_submodule(name)
        module.forward = functools.partial(forward, name, module.forward)
    return counts


def advised(
    model: nn.Module, example: Any, error: Exception, exclude: list[str]
) -> tuple[Any, str]:
    """Do what refusals advise until `sd.apply` works: leave out, or choose, what they name.

    Args:
        exclude: gets what was left out.
    """
    for _ in range(40):
        found = re.search(r"(exclude|include)=(\[.*?\])", str(error)) or re.search(
            r"(exclude)= leaves blocks as they are, say ('[^']*')", str(error)
        )
        if "no other block of the model can be skipped" in str(error) or not found:
            nothing = "no other block" in str(error)
            return None, "leaves nothing" if nothing else "cannot be followed by a program"
        named = ast.literal_eval(found[2])
        names = [named] if isinstance(named, str) else named
        if found[1] == "include":
            advice = {"include": names}
            exclude += ["all others"]
        else:
            exclude += names
            advice = {"exclude": exclude}
        try:
            handle = sd.apply(model, example=example, scale="inference", **advice)
            return handle, f"works: {found[1]}={advice[found[1]]}"
        except sd.errors.UnsupportedBlockError as again:
            error = again
        except sd.errors.ApplyError:
            return None, "leaves nothing"
    return None, "does not end"


def line(error: BaseException) -> str:
    kind = "" if isinstance(error, sd.errors.StochasticDepthError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:600]


def work(library: str, name: str, build: Build, out: Connection) -> None:
    """In a process of its own: judge a model, and send when it is built and what comes of it."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)

    is_built = False

    def tell() -> None:
        nonlocal is_built
        is_built = True
        out.send("built")

    def stop(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        result = judge(library, name, build, tell)
    except (TooLong, MemoryError) as error:
        reason = "memory" if isinstance(error, MemoryError) else f"more than {SECONDS} s"
        verdict = "slow" if is_built else "unbuilt"
        result = {"library": library, "model": name, "verdict": verdict, "reason": reason}
    except Exception as error:  # of this program, or of the original under the own account
        result = {"library": library, "model": name, "verdict": "wrong", "reason": line(error)}
    signal.setitimer(signal.ITIMER_PROF, 0)
    if "can't allocate memory" in result.get("reason", ""):
        result |= {"verdict": "slow" if is_built else "unbuilt", "reason": "memory"}
    out.send(result)
    os._exit(0)  # libraries leave threads behind


def run(library: str, wanted: Callable[[list[str]], list[str]], is_drawn: bool, out: Path) -> None:
    """In a process of its own, which has imported the library: judge models of it, each in another.

    Args:
        wanted: which of the models.
        is_drawn: those that were drawn, until `DRAWN` of them are small enough.
    """
    torch.set_num_threads(1)
    try:
        builders = dict(drawn(library) if is_drawn else BUILDERS[library]())
    except ImportError as error:
        print(f"{library} is not installed: {error}", flush=True)
        return
    with contextlib.suppress(Exception):
        next(iter(builders.values()))()  # imports what every process would import anew
    label = f"{FROM}{library}" if is_drawn else library
    left = DRAWN[library] if is_drawn else len(builders)
    known = {name: r for (of, name), r in read(out).items() if of == label}
    left -= sum(not is_large(r) for r in known.values()) if is_drawn else 0
    names, began = wanted(list(builders)), time.monotonic()
    print(f"{label}: {left if is_drawn else len(names)} of {len(builders)} to try", flush=True)
    for number, name in enumerate(names, 1):
        if left <= 0:
            return
        result = in_process(label, name, builders[name])
        left -= is_drawn and not is_large(result)
        with out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        keys = ("verdict", "blocks", "mechanisms", "seconds", "reason", "advice")
        seen = "  ".join(str(result[key]) for key in keys if key in result)
        minutes = (time.monotonic() - began) / 60
        print(f"{label} {number}/{len(names)} {minutes:.1f} min  {name}: {seen}", flush=True)


def is_large(result: dict[str, Any]) -> bool:
    """Whether a model was not tried because it is too large."""
    return result["verdict"] == "unbuilt" and TOO_LARGE in result["reason"]


def in_process(library: str, name: str, build: Build) -> dict[str, Any]:
    """What comes of one model, judged in a process of its own."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    worker = PROCESSES.Process(target=work, args=(library, name, build, sender))
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
    return result


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
    usual = [r for r in results if not r["library"].startswith(FROM)]
    rows = {name: [r for r in usual if r["library"] == name] for name in of_libraries(usual)}
    rows["all"] = usual
    if len(usual) < len(results):
        rows["drawn"] = [r for r in results if r["library"].startswith(FROM)]
    for name, tried in rows.items():
        counts = collections.Counter(r["verdict"] for r in tried)
        residual = sum(counts[verdict] for verdict in VERDICTS[:5])
        share = f"{100 * counts['complete'] / max(1, residual):.1f} %"
        row = [residual + counts["not residual"], residual, *(counts[v] for v in VERDICTS[:5])]
        table.add_row(name, *map(str, row), share)
    Console(width=120).print(table)
    for r in results:
        if r["verdict"] not in ("complete", "not residual") and not is_large(r):
            print(f"{r['library']}/{r['model']}: {r['verdict']}: {told(r)}")


def of_libraries(results: list[dict[str, Any]]) -> list[str]:
    known = {r["library"] for r in results}
    return [name for name in (*BUILDERS, *(f"{FROM}{name}" for name in DRAWN)) if name in known]


def told(result: dict[str, Any]) -> str:
    """Why a model is not complete, and what came of the advice."""
    if result["verdict"] == "missed":
        return f"{result['missed']} additions that no block has"
    advice = f" (the advice: {result['advice']})" if "advice" in result else ""
    reason = re.sub(r"/\S*/site-packages/", "", result["reason"])
    return reason.split("; exclude=")[0].split("; no other block")[0] + advice


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """By library and verdict: names, with the number of blocks or the reason."""
    versions = {"torch": torch.__version__}
    for name in BUILDERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(PACKAGE.get(name, name))
    made: dict[str, Any] = {
        "processor": processor(),
        "minutes": round(sum(r.get("seconds", SECONDS) for r in results) / 60, 1),
        "limits": f"{SECONDS} s of processor time, {BYTES >> 30} GiB, {LARGE} parameters",
        "versions": versions,
    }
    for library in of_libraries(results):
        verdicts: dict[str, Any] = {}
        for r in (r for r in results if r["library"] == library):
            verdict = "not tried: too large" if is_large(r) else r["verdict"]
            said = r["blocks"] if verdict == "complete" else told(r)
            verdicts.setdefault(verdict, {})[r["model"]] = said
        for verdict in ("not residual", "not tried: too large"):
            if verdict in verdicts:
                verdicts[verdict] = " ".join(verdicts[verdict])
        if left := not_tried(library):
            verdicts["not tried: variants of what is, or set aside for the draw"] = left
        made[library] = verdicts
    return made


def processor() -> str:
    """Its name, the number of cores, and its widest vector instructions."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name[1] if name else platform.processor()}, {os.cpu_count()} cores, {capability}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each model")
    parser.add_argument("--library", nargs="+", choices=list(BUILDERS), default=list(BUILDERS))
    parser.add_argument("--only", nargs="+", help="models by name")
    parser.add_argument("--again", nargs="+", default=[], help="verdicts that are tried again")
    parser.add_argument("--sample", type=int, help="so many of each library")
    parser.add_argument("--drawn", action="store_true", help="a draw of those that are not tried")
    parser.add_argument("--report", action="store_true", help="only the table")
    parser.add_argument("--summary", type=Path, help="what came of them, in one small file")
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    done = {} if asked.only else read(asked.out)
    libraries = [name for name in asked.library if name in DRAWN or not asked.drawn]
    for library in [] if asked.report else libraries:

        def wanted(names: list[str], library: str = library) -> list[str]:
            names = [name for name in names if not asked.only or name in asked.only]
            label = f"{FROM}{library}" if asked.drawn else library
            known = {n: done[label, n]["verdict"] for n in names if (label, n) in done}
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
