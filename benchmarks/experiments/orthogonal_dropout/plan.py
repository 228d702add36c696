"""The study cut into pieces that need nothing of one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Piece:
    """What one process builds at a time.

    Attributes:
        part: Pictures or texts.
        step: The method of `Images` or `Texts` that builds it.
        arguments: The method's.
    """

    part: Literal["images", "texts"]
    step: str
    arguments: tuple[Any, ...] = ()

    @property
    def stages(self) -> int:
        """How many stages it is: a merge is a curve on validation rows and scores on test rows."""
        return 2 if self.step == "merge" else 1
