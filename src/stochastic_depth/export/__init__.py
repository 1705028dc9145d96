"""Out of training: plain and shallower models, files of them, and what they say of a picture."""

from stochastic_depth.export.fold import fold
from stochastic_depth.export.load import Exported, load_export
from stochastic_depth.export.truncate import Dropped, drop_order, truncate

__all__ = ["Dropped", "Exported", "drop_order", "fold", "load_export", "truncate"]
