"""Files that many tests write or read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def merge_record(adapter: Path) -> dict[str, Any]:
    """What osrm.json in an adapter's directory says of the merge that it is."""
    made: dict[str, Any] = json.loads((adapter / "osrm.json").read_text())["merge"]
    return made
