"""What the alternatives that every network has are called."""

CONSTANT = "constant depth"
OURS = "stochastic-depth"
