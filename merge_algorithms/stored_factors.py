"""One module's factors as files store them: linear layers, embeddings, convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from merge_algorithms.errors import UserError
from merge_algorithms.layout import Layout


class Factors(NamedTuple):
    """One module's update dW = scale * b @ a, b (d_out, r) and a (r, d_in) in the file's dtype."""

    b: Tensor
    a: Tensor
    layout: Layout
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The number r of rows of a."""
        return len(self.a)


def matrices(path: Path, module: str, sides: Mapping[str, Tensor]) -> Factors:
    """The two factors of one module as matrices, from what `path` stores of them."""
    embedding = all(side.startswith("embedding_") for side in sides)
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    for name, other in (names, names[::-1]):
        if name not in sides:
            raise UserError(
                f"{path} has lora_{other} of {module} but no lora_{name}: save it again"
            )
        if not sides[name].is_floating_point():
            raise UserError(
                f"{path} has lora_{name} of {module} in {sides[name].dtype}, which are no numbers"
                " of an update: save it again in a floating-point type"
            )
    a, b = (sides[name] for name in names)
    if not a.numel() or not b.numel():
        raise UserError(
            f"{path} has empty factors, {tuple(b.shape)} and {tuple(a.shape)}, for {module}: leave"
            " the module out and save the file again"
        )
    if a.ndim == b.ndim == 2:
        return Factors(b, a, Layout("embedding" if embedding else "linear"))
    if a.ndim != b.ndim or not 3 <= a.ndim <= 5 or math.prod(b.shape[2:]) != 1:
        raise UserError(
            f"{path} has factors of shapes {tuple(b.shape)} and {tuple(a.shape)} for {module}:"
            " expected two matrices, or two kernels of which that of B is 1 x 1"
        )
    if b.shape[1] != a.shape[0]:
        raise UserError(
            f"{path} has LoRA on a grouped convolution ({module}), whose factors do not multiply"
            " to an update of its weight: train the adapter without it in target_modules"
        )
    return Factors(b.flatten(1), a.flatten(1), Layout("convolution", tuple(a.shape[2:])))


def factor_tensors(module: str, factors: Factors) -> dict[str, Tensor]:
    """The factors of one module, of scale 1, under PEFT's names and in float32."""
    b, a = factors.layout.stored(factors.b.float(), factors.a.float())
    if factors.layout.kind == "embedding":
        return {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
