"""The OSRM method: covariance, subspace, initialisation, constraint, interference."""

from __future__ import annotations

from osrm.collect import collect_covariance, covariance_memory
from osrm.constraint import freeze_lora_a, project_lora_a
from osrm.convert import Converted, convert_adapter, convert_checkpoint
from osrm.covariance import Covariance
from osrm.diagnostics import (
    InputSpectrum,
    bottom_share,
    drift,
    effective_rank,
    input_spectra,
    overlap_matrix,
    principal_angles,
    spectrum,
)
from osrm.filtered import FilteredSteps
from osrm.fisher import Fisher, collect_fisher
from osrm.gradients import Gradients, collect_gradients
from osrm.initialize import initialize_lora_osrm_weights
from osrm.interference import (
    Energies,
    adapter_leaked_energy,
    interference_matrix,
    leaked_energy,
    leaked_over_own,
    leaked_own_ratio,
    module_energies,
    output_shift,
)
from osrm.others import others_moments
from osrm.output_filter import output_filters
from osrm.penalty import LeakPenalty
from osrm.prefixes import with_prefix_of
from osrm.state import subspace_state
from osrm.subspace import bottom_subspace, contrastive_subspace, official_subspace
from osrm.targets import lora_a, resolve_targets
from osrm.wiener import Separation, separations, wiener_filters

__all__ = [
    "Converted",
    "Covariance",
    "Energies",
    "FilteredSteps",
    "Fisher",
    "Gradients",
    "InputSpectrum",
    "LeakPenalty",
    "Separation",
    "adapter_leaked_energy",
    "bottom_share",
    "bottom_subspace",
    "collect_covariance",
    "collect_fisher",
    "collect_gradients",
    "contrastive_subspace",
    "convert_adapter",
    "convert_checkpoint",
    "covariance_memory",
    "drift",
    "effective_rank",
    "freeze_lora_a",
    "initialize_lora_osrm_weights",
    "input_spectra",
    "interference_matrix",
    "leaked_energy",
    "leaked_over_own",
    "leaked_own_ratio",
    "lora_a",
    "module_energies",
    "official_subspace",
    "others_moments",
    "output_filters",
    "output_shift",
    "overlap_matrix",
    "principal_angles",
    "project_lora_a",
    "resolve_targets",
    "separations",
    "spectrum",
    "subspace_state",
    "wiener_filters",
    "with_prefix_of",
]
