"""LoRA adapters as low-rank factors and every way to merge them."""

from merge_algorithms import (  # noqa: F401  (they register methods)
    data_aware,
    dropout,
    elementwise,
    emr,
    linear,
    spherical,
    subspace,
)
from merge_algorithms.adapter import Adapter, LowRank
from merge_algorithms.emr_bundle import EmrBundle
from merge_algorithms.errors import UserError
from merge_algorithms.merge import Merged, merge
from merge_algorithms.registry import methods
from merge_algorithms.runtime import attach

__all__ = [
    "Adapter",
    "EmrBundle",
    "LowRank",
    "Merged",
    "UserError",
    "attach",
    "merge",
    "methods",
]
