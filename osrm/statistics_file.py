"""Files with statistics of a task's data, which can be published without the data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from merge_algorithms.errors import UserError
from merge_algorithms.files import atomic_file

Statistics = TypeVar("Statistics")


@dataclass(frozen=True)
class StatisticsFile:
    """One format: a safetensors file with a JSON header that says what the tensors are.

    Attributes:
        kind: What it holds; `osrm KIND` is the command that writes it.
        version: Of the format, as it is written; older ones are read as well.
    """

    kind: str
    version: int

    def write(
        self, path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
    ) -> None:
        """Write the file, complete or not at all; the same content always gives the same bytes."""
        header = {"format": f"osrm-{self.kind}", "version": self.version, **header}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with atomic_file(path) as temporary:
            # One entry: safetensors does not keep the order of several.
            save_file(contiguous, temporary, {"osrm": json.dumps(header, sort_keys=True)})

    def read(
        self, path: str | Path, make: Callable[[dict[str, Any], dict[str, Tensor]], Statistics]
    ) -> Statistics:
        """What `make` makes of the header and the tensors.

        Raises:
            UserError: no such file, not of this kind, truncated, of another version, or `make`
                raises what content that is not as it should be leads to.
        """
        path = Path(path)
        if not path.is_file():
            what = "is no file" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}: give a file that `osrm {self.kind}` wrote")
        try:
            with safe_open(path, framework="pt") as file:
                header = self._header(path, file.metadata())
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(
                f"{path} is not a complete safetensors file ({error}): collect or copy it again"
            ) from error
        try:
            return make(header, tensors)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not a usable {self.kind} file ({error}): collect it again"
            ) from error

    def _header(self, path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
        try:
            header = json.loads((metadata or {}).get("osrm", "null"))
        except json.JSONDecodeError:
            header = None
        if not isinstance(header, dict) or header.get("format") != f"osrm-{self.kind}":
            raise UserError(
                f"{path} is a safetensors file but not a {self.kind} file: give one that"
                f" `osrm {self.kind}` wrote"
            )
        if header.get("version") not in range(1, self.version + 1):
            known = " or ".join(map(str, range(1, self.version + 1)))
            raise UserError(
                f"{path} has {self.kind} format version {header.get('version')}, this release"
                f" reads version {known}: collect it again or use the release that wrote it"
            )
        return header
