"""What an optimiser steps on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer


def stepped(parameters: Iterable[Tensor], optimizer: Optimizer | None) -> list[Tensor]:
    """Those of the parameters that the optimiser holds; all of them if it is None."""
    groups = optimizer.param_groups if optimizer is not None else []
    held = {id(parameter) for group in groups for parameter in group["params"]}
    return [p for p in parameters if optimizer is None or id(p) in held]
