"""python -m stochastic_depth."""

import sys

from stochastic_depth.cli import main

sys.exit(main())
