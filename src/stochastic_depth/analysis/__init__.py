"""What runs cost and came to, and what their networks can do: as tables and JSON."""

from stochastic_depth.analysis.comparison import (
    Comparison,
    compare,
    train_pairs,
    write_comparison,
)
from stochastic_depth.analysis.tables import comparison_table, run_table

__all__ = [
    "Comparison",
    "compare",
    "comparison_table",
    "run_table",
    "train_pairs",
    "write_comparison",
]
