"""How modules and their LoRA factors store the matrices that updates change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["linear", "convolution", "embedding"]


@dataclass(frozen=True)
class Layout:
    """What a (d_out, d_in) update means to its module.

    Every method works on the matrix alone; only reading, writing and applying know the layout.

    Attributes:
        kind: 'linear': the module multiplies its input by the matrix. 'convolution': d_in runs
            over input channels and kernel positions, A is stored as (r, channels, *kernel) and B
            as (d_out, r, 1, ..). 'embedding': column i is added to the vector of token i, so the
            weight is stored transposed, (vocabulary, d_out).
        kernel: The kernel's size in one to three dimensions; empty unless a convolution.
    """

    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()

    def __str__(self) -> str:
        """As error messages name it."""
        return f"{self.kind} {'x'.join(map(str, self.kernel))}".strip()

    def stored(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The factors (d_out, r) and (r, d_in) in the shapes that PEFT stores."""
        if self.kind != "convolution":
            return b, a
        channels = a.shape[1] // math.prod(self.kernel)
        ones = (1,) * len(self.kernel)
        return b.reshape(*b.shape, *ones), a.reshape(len(a), channels, *self.kernel)


LINEAR = Layout()
Layouts = Mapping[str, Layout]  # module name -> layout; a module without an entry is linear
