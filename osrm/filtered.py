"""Training A = M F or B = H N with fixed filters, while the model holds A and B themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from merge_algorithms.errors import UserError
from merge_algorithms.precision import full_precision
from osrm.initialize import find_rows
from osrm.optimizers import stepped
from osrm.targets import lora_factors

Side = Literal["inputs", "outputs"]

# A's layer -> what A was before the last start, and what it was then made: training can begin again
# without a step in between, after a failure, say, or after a search for the learning rate.
_STARTED: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = WeakKeyDictionary()


class FilteredSteps:
    """Makes any optimiser's steps on A those that it would take on M, where A = M F.

    The gradient of M is that of A times F^T, and a step dM moves A by dM F. So gradients are
    filtered before the optimiser sees them, what it adds to A afterwards; M itself is never
    needed, and the model can be saved or evaluated at any time. Holds for every optimiser whose
    steps read nothing of A but its gradient; decoupled weight decay reads A, and counts as part of
    the step here, so that it is not M's. The same goes for B = H N, on the side of the outputs.

    Args:
        peft_model: A model with the adapter.
        filters: Module name -> F, (d_in, d_in), as `wiener_filters` returns, or H, (d_out, d_out),
            as `output_filters` does.
        adapter_name: PEFT's name of the adapter.
        side: Whether it is A that is filtered, by F, or B, by H.

    Raises:
        UserError: no such adapter, or a module without a filter or with one of another shape.
    """

    def __init__(
        self,
        peft_model: nn.Module,
        filters: Mapping[str, Tensor],
        adapter_name: str = "default",
        side: Side = "inputs",
    ) -> None:
        self._side = side
        what = "filter" if side == "inputs" else "output filter"
        factors = lora_factors(peft_model, adapter_name)
        self._layers = {name: a if side == "inputs" else b for name, (a, b) in factors.items()}
        self._weights = {name: layer.weight for name, layer in self._layers.items()}
        self._filters = {
            name: find_rows(filters, name, self._rows(weight), what)
            for name, weight in self._weights.items()
        }
        for name, matrix in self._filters.items():
            if len(matrix) != matrix.shape[1]:
                raise UserError(
                    f"{name} has a filter of shape {tuple(matrix.shape)}: expected (d_in, d_in), as"
                    " wiener_filters returns it, or (d_out, d_out), as output_filters does"
                )
        self._before: dict[str, Tensor] = {}
        self._placed: dict[int, Tensor] = {}

    @torch.no_grad()
    def start(self) -> None:
        """A <- A F, before the first step; a B that is zero stays so.

        An A that is still bit for bit what an earlier start left goes back to what it was before:
        it is behind this filter then, and behind no other.
        """
        for name, layer in self._layers.items():
            weight = layer.weight
            fresh, left = _STARTED.get(layer, (weight, None))
            if left is None or not torch.equal(left.to(weight), weight):
                fresh = weight.clone()
            weight.copy_(self._through(name, fresh.to(weight)))
            _STARTED[layer] = fresh, weight.clone()

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer | None = None) -> None:
        """Filter the gradients, and remember A; once for each step, however often it is announced.

        Args:
            optimizer: Whose step it is, if there are several: what it does not hold is left alone.
        """
        if any(not torch.equal(self._weights[n], before) for n, before in self._before.items()):
            self.after_step()  # of an earlier step, in a loop that makes several of one batch
        held = set(map(id, stepped(self._weights.values(), optimizer)))
        for name, weight in self._weights.items():
            if id(weight) in held and weight.grad is not None and name not in self._before:
                weight.grad.copy_(self._through(name, weight.grad, transposed=True))
                self._before[name] = weight.detach().clone()

    @torch.no_grad()
    def after_step(self) -> None:
        """Filter what the step has added; nothing if there was none since `before_step`."""
        for name, before in self._before.items():
            weight = self._weights[name]
            weight.copy_(before + self._through(name, weight - before))
        self._before.clear()

    def _rows(self, weight: Tensor) -> Tensor:
        """A itself, or the columns of B as rows."""
        return weight if self._side == "inputs" else weight.T

    def _through(self, name: str, weight: Tensor, transposed: bool = False) -> Tensor:
        """A times F, or H times B, or so with the filter's transpose, in float32."""
        filter_ = self._on(self._filters[name], weight)
        if transposed != (self._side == "outputs"):
            filter_ = filter_.T
        with full_precision(weight.device):
            return self._rows(self._rows(weight).float() @ filter_)

    def _on(self, matrix: Tensor, like: Tensor) -> Tensor:
        """F on the device of A, one copy for all modules that share it."""
        placed = self._placed.get(id(matrix))
        if placed is None or placed.device != like.device:
            placed = self._placed[id(matrix)] = matrix.to(like.device, torch.float32)
        return placed
