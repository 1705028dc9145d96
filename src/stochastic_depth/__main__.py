"""Lets `python -m stochastic_depth` run the command line."""

import sys

from stochastic_depth.cli import main

sys.exit(main())
