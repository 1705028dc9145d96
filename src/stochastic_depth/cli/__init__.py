"""The command line: parse, call, print.

Exit codes: 0 done; 1 an error, told in one line; 2 a command line that cannot be understood;
128 + n stopped by signal n, with a checkpoint where a run was under way.
"""

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Iterable, Sequence

from stochastic_depth import __version__
from stochastic_depth.errors import StochasticDepthError
from stochastic_depth.extras import require
from stochastic_depth.terminal import visible

COMMANDS = {
    "train": "train a recipe, or go on with a run",
    "eval": "test error of a run's network",
    "compare": "a recipe against its constant-depth twin, over seeds",
    "analyze": "gradients, active blocks, the ensemble, removed blocks",
    "sweep": "a recipe over a grid: p_L and survival rules, or p_L and depths",
    "report": "tables and figures of runs, on one page",
    "export": "a run's network as a plain file, at full or lower depth",
    "predict": "what a run's or an exported network sees in pictures",
    "bench": "what skipping saves, against others, and what the library costs",
    "inspect": "what can be skipped in a model, and what that saves",
    "recipes": "the published results that can be reproduced",
}
HELP = """usage: stochastic-depth COMMAND [OPTIONS]

Deep networks with stochastic depth (Huang et al. 2016).

{commands}

stochastic-depth COMMAND --help tells the options of a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = _run(command, rest)
        sys.stdout.flush()
        return code
    except StochasticDepthError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except SystemExit as exit:  # the parser has said what is wrong, or printed help
        if isinstance(exit.__context__, BrokenPipeError):  # how rich ends when nobody reads
            return 128 + signal.SIGPIPE
        return int(exit.code or 0)


def _run(command: str, rest: list[str]) -> int:
    if command in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(HELP.format(commands="\n".join(f"  {k:{width}}  {v}" for k, v in COMMANDS.items())))
        return 0
    if command == "--version":
        print(f"stochastic-depth {__version__}")
        return 0
    if command not in COMMANDS:
        return usage_error("command", command, COMMANDS)
    for module in ("tyro", "rich", "safetensors"):
        require(module, "train")
    return importlib.import_module(f"stochastic_depth.cli.{command}").main(rest)


def usage_error(what: str, given: str, known: Iterable[str]) -> int:
    """Say that `given` is no `what`, and which one may have been meant."""
    close = difflib.get_close_matches(given, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"
    print(f"error: there is no {what} {given!r}; {hint}", file=sys.stderr)
    return 2
