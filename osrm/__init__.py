"""The OSRM method: covariance, subspace, initialisation, constraint, interference."""

from __future__ import annotations

from osrm.collect import collect_covariance
from osrm.constraint import freeze_lora_a, project_lora_a
from osrm.covariance import Covariance
from osrm.initialize import initialize_lora_osrm_weights, subspace_state
from osrm.interference import (
    adapter_leaked_energy,
    drift,
    interference_matrix,
    leaked_energy,
    leaked_own_ratio,
    output_shift,
)
from osrm.subspace import bottom_subspace, official_subspace
from osrm.targets import lora_a, resolve_targets

__all__ = [
    "Covariance",
    "adapter_leaked_energy",
    "bottom_subspace",
    "collect_covariance",
    "drift",
    "freeze_lora_a",
    "initialize_lora_osrm_weights",
    "interference_matrix",
    "leaked_energy",
    "leaked_own_ratio",
    "lora_a",
    "official_subspace",
    "output_shift",
    "project_lora_a",
    "resolve_targets",
    "subspace_state",
]
