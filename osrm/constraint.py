"""What A may do while the adapter trains: 'freeze' and 'project' ('init' asks nothing)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from merge_algorithms.precision import full_precision
from osrm.initialize import find_rows
from osrm.targets import lora_factors


def freeze_lora_a(peft_model: nn.Module, adapter_name: str = "default") -> None:
    """Keep A as it is, without a gradient; only B trains. Call it before the optimiser is made.

    PEFT's `set_adapter` makes A trainable again, and so does leaving its `disable_adapter`: where
    a training does that, call it before every step of the optimiser, too.

    Raises:
        UserError: no module carries the adapter.
    """
    for a, _ in lora_factors(peft_model, adapter_name).values():
        a.weight.requires_grad_(False)
        a.weight.grad = None


@torch.no_grad()
def project_lora_a(
    peft_model: nn.Module, bases: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Put A back into its subspace, A <- A V^T V: the nearest matrix in it (Frobenius norm).

    Call it after every optimiser step. Bases already on the model's device save a copy per call.

    Args:
        peft_model: The model being trained.
        bases: What `subspace_state` returned: module name -> (k, d_in), orthogonal rows of any
            length (the scale of a state does not matter here); V holds them at length 1.
        adapter_name: PEFT's name of the adapter.

    Raises:
        UserError: nothing is changed; a module is missing in `bases` or has another width.
    """
    factors = lora_factors(peft_model, adapter_name)
    pairs = [(a.weight, find_rows(bases, name, a.weight)) for name, (a, _) in factors.items()]
    with full_precision(pairs[0][0].device):
        for a, rows in pairs:
            v = nn.functional.normalize(rows.to(a.device, torch.float32))
            a.copy_((a.float() @ v.T) @ v)
