"""Plain and shallower models of trained networks, their files, and predictions with them."""

from stochastic_depth.export.drop_order import Dropped, drop_order
from stochastic_depth.export.fold import fold
from stochastic_depth.export.load import Exported, load_export
from stochastic_depth.export.truncate import truncate

__all__ = ["Dropped", "Exported", "drop_order", "fold", "load_export", "truncate"]
