"""What the benchmarks merge: random adapters with the shapes of well-known models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merge_algorithms import Adapter, LowRank

Shape = tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """Adapters to merge.

    Attributes:
        name: For titles.
        shapes: (d_out, d_in) of the modules of one layer; those with equal d_in read one input.
        layers: Number of layers.
        tasks: T, the number of adapters.
        rank: r of every adapter.
    """

    name: str
    shapes: tuple[Shape, ...]
    layers: int
    tasks: int = 8
    rank: int = 8

    @property
    def modules(self) -> dict[str, Shape]:
        """Module name -> (d_out, d_in)."""
        return {
            f"layers.{layer}.linear{i}": shape
            for layer in range(self.layers)
            for i, shape in enumerate(self.shapes)
        }

    def tiny(self) -> Problem:
        """The same number of adapters and modules per layer, at a size that takes no time."""
        return replace(self, shapes=((48, 32),) * len(self.shapes), layers=2, rank=2)

    def adapters(self, count: int | None = None) -> list[Adapter]:
        """`count` adapters, all T by default, with Gaussian factors."""
        return [self._adapter(t) for t in range(self.tasks if count is None else count)]

    def statistics(self, needs: str, count: int | None = None) -> Mapping[str, dict[str, Tensor]]:
        """Adapter name -> module name -> covariance (d_in, d_in) or Fisher (d_out, d_in).

        All layers have tensors of their own that share one memory per adapter and shape: a
        method cannot tell, and inputs of many GB stay small.
        """
        return {
            f"task{t}": self._statistics(needs, t)
            for t in range(self.tasks if count is None else count)
        }

    def _adapter(self, t: int) -> Adapter:
        draw = torch.Generator().manual_seed(t)
        updates = {
            module: LowRank(
                torch.randn(d_out, self.rank, generator=draw),
                torch.randn(self.rank, d_in, generator=draw) / d_in**0.5,
            )
            for module, (d_out, d_in) in self.modules.items()
        }
        return Adapter(f"task{t}", updates)

    def _statistics(self, needs: str, t: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1000 + t)
        made: dict[Shape, Tensor] = {}
        found = {}
        for layer in range(self.layers):
            views: dict[Shape, Tensor] = {}
            for i, (d_out, d_in) in enumerate(self.shapes):
                shape = (d_in, d_in) if needs == "covariance" else (d_out, d_in)
                if shape not in made:
                    made[shape] = (
                        _covariance(d_in, draw)
                        if needs == "covariance"
                        else torch.rand(shape, generator=draw)
                    )
                views.setdefault(shape, made[shape][:])
                found[f"layers.{layer}.linear{i}"] = views[shape]
        return found


def _covariance(d: int, draw: torch.Generator) -> Tensor:
    """A well-conditioned second moment with some strong directions."""
    features = torch.randn(64, d, generator=draw)
    return (features.T @ features / 64).add_(torch.eye(d))


ROBERTA_LARGE = Problem("RoBERTa-large, query and value", ((1024, 1024), (1024, 1024)), 24)
LLAMA_3_8B = Problem("Llama-3-8B, query and value", ((4096, 4096), (1024, 4096)), 32, rank=16)


def small(problem: Problem) -> Problem:
    """A sixteenth of the widths and two layers, to try the benchmarks."""
    shapes = tuple((d_out // 16, d_in // 16) for d_out, d_in in problem.shapes)
    return replace(problem, name=f"{problem.name}, a sixteenth as wide", shapes=shapes, layers=2)
