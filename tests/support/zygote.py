"""A process that has imported everything, and forks to run commands: a start costs little.

Reads lines of JSON, [arguments, file for the output]; writes the process id, then the exit code.
"""

import json
import os
import sys

import stochastic_depth.cli.train
import stochastic_depth.distributed
import stochastic_depth.train.display
import stochastic_depth.train.fit
import stochastic_depth.train.run_folder  # noqa: F401
from stochastic_depth.cli import main

for line in sys.stdin:
    arguments, output = json.loads(line)
    pid = os.fork()
    if pid == 0:
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os._exit(main(arguments))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
