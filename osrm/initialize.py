"""The second of two steps, as PEFT users know them from EVA: a subspace state into a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from merge_algorithms.errors import UserError, suggest
from osrm.targets import lora_factors

# PEFT's initialisations that leave the base model's weights as they are, and B to training.
_PLAIN = (True, False, "gaussian", "orthogonal", "eva")


@torch.no_grad()
def initialize_lora_osrm_weights(
    peft_model: nn.Module, state: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Start the adapter in the subspace: A becomes the first r rows of `state`, B zero.

    The rows enter with the length that they have: the state's scale.

    The model computes what its base computes until B is trained. r is each module's own LoRA rank;
    modules of `state` that carry no adapter are left aside.

    Args:
        peft_model: A model with the adapter, made with init_lora_weights=True.
        state: What `subspace_state` returned: module name -> (k, d_in), k >= r.
        adapter_name: PEFT's name of the adapter.

    Raises:
        UserError: nothing is changed; no such adapter, a module missing in `state`, another
            width, fewer rows than the rank, or an adapter that has changed the base weights
            or fixed its B.
    """
    factors = lora_factors(peft_model, adapter_name)
    config = getattr(peft_model, "peft_config", {}).get(adapter_name)
    made_with = getattr(config, "init_lora_weights", True)
    if made_with not in _PLAIN:
        mica = str(made_with).lower() == "mica"  # as PEFT compares it
        does = "fixes B, so that it would stay zero" if mica else "changes the base weights"
        raise UserError(
            f"the adapter '{adapter_name}' was made with init_lora_weights={made_with!r}, which"
            f" {does}: make it with init_lora_weights=True"
        )
    for name, (a, _) in factors.items():
        rows, rank = find_rows(state, name, a.weight), len(a.weight)
        if len(rows) < rank:
            raise UserError(
                f"the subspace state has {len(rows)} rows for {name}, whose rank is {rank}: compute"
                f" it with rank={rank} or more"
            )
    for name, (a, b) in factors.items():
        a.weight.copy_(state[name][: len(a.weight)])
        b.weight.zero_()
        if b.bias is not None:
            b.bias.zero_()


def find_rows(
    state: Mapping[str, Tensor], module: str, a: Tensor, what: str = "subspace"
) -> Tensor:
    """The rows of `state` for `module`, (k, d_in), checked against its A, (r, d_in).

    Args:
        state: Module name -> rows.
        module: Name of the module.
        a: Its A.
        what: What the messages call the rows of one module.

    Raises:
        UserError: `state` has no such module, or another width.
    """
    if module not in state:
        collected = "gradients" if what == "output filter" else "covariances"
        raise UserError(
            f"there is no {what} for module '{module}', {suggest(module, state)}: collect the"
            f" {collected} with the adapter's target modules"
        )
    rows = state[module]
    if rows.ndim != 2 or rows.shape[1] != a.shape[1]:
        does = "writes" if what == "output filter" else "reads"
        raise UserError(
            f"the {what} has shape {tuple(rows.shape)} for {module}, which {does}"
            f" {a.shape[1]} features: it was computed for another model"
        )
    return rows
