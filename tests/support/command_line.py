"""The command line, where torchvision's wheel is one for GPUs."""

import sys

import support.operators  # noqa: F401
from stochastic_depth.cli import main

if __name__ == "__main__":
    sys.exit(main())
