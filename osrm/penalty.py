"""A term of the loss that keeps an adapter's outputs on the other tasks' inputs small."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer

from merge_algorithms.errors import UserError
from merge_algorithms.modules import is_transposed
from merge_algorithms.precision import full_precision
from osrm.initialize import find_rows
from osrm.optimizers import stepped
from osrm.passes import evaluation_mode
from osrm.targets import lora_factors, lora_layers


@dataclass
class _Term:
    """One module's share of the penalty."""

    layer: LoraLayer
    a: nn.Linear
    b: nn.Linear
    moment: Tensor
    base_energy: float


class LeakPenalty:
    """gamma times the mean over modules of E_others ||dW h||^2 / E_others ||W0 h||^2.

    With dW = s B A and S the second moment of the other tasks' inputs, the numerator is
    s^2 tr((B^T B)(A S A^T)): one product of A with S, then r x r matrices. No data of other tasks
    is needed while training, their covariance files are. The denominator is constant and computed
    here, once; it makes the penalty independent of the scale of weights and inputs. Ours; it
    continues, through training, what OSRM (arXiv 2505.22934) does to A at the start.

    Calling it gives a scalar to add to the loss; gradients flow to A (unless frozen) and B. Or
    `add_gradient` adds them to those of the loss, once a step of however many batches. The
    matrices S follow the model to its device, one copy for all modules that read the same input.

    Args:
        peft_model: A model with the adapter. A quantised base layer is asked for its outputs on
            unit vectors, so that the weight in the denominator is the one it computes with.
        others: Module name -> S, (d_in, d_in), as `others_moments` returns.
        gamma: Weight of the penalty in the loss, above 0.
        adapter_name: PEFT's name of the adapter.

    Raises:
        UserError: gamma is not a positive number, no such adapter, one with DoRA or lora_bias, a
            module without S or with one of another width, or one whose base weight gives no output
            on the others' inputs.
    """

    def __init__(
        self,
        peft_model: nn.Module,
        others: Mapping[str, Tensor],
        gamma: float,
        adapter_name: str = "default",
    ) -> None:
        if not (gamma > 0 and math.isfinite(gamma)):
            raise UserError(f"the leak penalty's gamma is {gamma}: give a number above 0")
        self.gamma = gamma
        self._adapter = adapter_name
        self._placed: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self._terms: list[_Term] = []
        layers = lora_layers(peft_model)
        for name, (a, b) in lora_factors(peft_model, adapter_name).items():
            moment = find_rows(others, name, a.weight, "second moment")
            if len(moment) != moment.shape[1]:
                raise UserError(
                    f"{name} has a second moment of shape {tuple(moment.shape)}: expected"
                    " (d_in, d_in), as others_moments returns it"
                )
            layer = layers[name]
            if layer.lora_bias.get(adapter_name):
                raise UserError(
                    f"the adapter '{adapter_name}' uses a bias on the LoRA factors (lora_bias) at"
                    f" {name}, which the leak penalty does not describe: make it without lora_bias"
                )
            base_energy = _base_energy(layer.get_base_layer(), moment, a.weight.device)
            if not base_energy > 0:
                raise UserError(
                    f"the base weight of {name} gives no output on the other tasks' inputs, so"
                    " there is nothing to compare a leak with: leave it out of the target modules"
                )
            self._terms.append(_Term(layer, a, b, moment, base_energy))

    def __call__(self) -> Tensor:
        """The penalty at the current A and B, a scalar in float32 (float64 for such factors)."""
        with full_precision(self._terms[0].a.weight.device):
            shares = [self._energy(term) / term.base_energy for term in self._terms]
            shares = [share.to(shares[0].device) for share in shares]  # of a model on several
            return self.gamma * torch.stack(shares).mean()

    def add_gradient(self, optimizer: Optimizer | None = None, scale: float = 1.0) -> None:
        """Add the penalty's gradient to the loss's, before a step; none where the loss has none.

        Args:
            optimizer: Whose step it is, if there are several: what it does not hold is left alone.
            scale: What the loss's gradient is multiplied by, if a scaler has not undone it yet.
        """
        factors = (p for term in self._terms for p in (term.a.weight, term.b.weight))
        held = [p for p in stepped(factors, optimizer) if p.requires_grad]
        if any(p.grad is not None for p in held):
            with torch.enable_grad():  # optimisers call closures without
                (scale * self()).backward(inputs=held)

    def _energy(self, term: _Term) -> Tensor:
        """E ||dW h||^2 = s^2 sum((B^T B) * (A S A^T)) over the others' inputs h."""
        dtype = torch.promote_types(term.a.weight.dtype, torch.float32)
        a, b = term.a.weight.to(dtype), term.b.weight.to(dtype)
        through = a @ self._on(term.moment, a) @ a.T
        scale: float = term.layer.scaling[self._adapter]
        return scale**2 * ((b.T @ b) * through).sum()

    def _on(self, moment: Tensor, a: Tensor) -> Tensor:
        """S in the dtype and on the device of A."""
        key = id(moment), a.device, a.dtype
        if key not in self._placed:
            self._placed[key] = moment.to(a.device, a.dtype)
        return self._placed[key]


@torch.no_grad()
def _base_energy(layer: nn.Module, moment: Tensor, device: torch.device) -> float:
    """E ||W0 h||^2 = tr(W0 S W0^T)."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        matrix = weight.T if is_transposed(layer) else weight
    else:
        inputs = torch.eye(len(moment), device=device)
        with evaluation_mode(layer):
            matrix = (layer(inputs) - layer(torch.zeros_like(inputs))).T
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    with full_precision(matrix.device):
        return float(((matrix @ moment.to(matrix)) * matrix).sum())
