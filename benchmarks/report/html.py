"""Templates to self-contained pages: no scripts, nothing fetched, everything escaped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from merge_algorithms.files import atomic_file

HERE = Path(__file__).parent


def write_html(target: Path, template: str, folder: Path = HERE, **values: Any) -> Path:
    """Fill a template of `folder`, which may include those beside this file; returns `target`."""
    templates = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template(template).render(values)
    with atomic_file(target) as path:
        path.write_text(page, encoding="utf-8")
    return target


def flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, value)."""
    if isinstance(value, dict) and (value or not path):
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        yield path, ", ".join(map(str, value))
    else:
        yield path, str(value)
