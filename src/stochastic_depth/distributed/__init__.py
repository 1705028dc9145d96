"""Training in many processes, in which closed blocks send nothing.

Plain `DistributedDataParallel` and `fully_shard` work with an applied model as they are; with these
a closed block costs no communication either. Names load when they are touched: sharding takes
seconds to import, and a run of one process needs none of it.
"""

from stochastic_depth.lazy import lazily as _lazily

__getattr__, __dir__, __all__ = _lazily(__name__)
