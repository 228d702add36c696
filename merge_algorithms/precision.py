"""Products of float32 factors in float32, whatever the program around has chosen for speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# Since torch 2.9 every backend has a setting of its own; a program that uses these can no longer
# read the older, common one.
_BACKENDS: list[Any] = [
    getattr(library, "matmul", None) for library in (torch.backends.cuda, torch.backends.mkldnn)
]
_BY_BACKEND = all(hasattr(backend, "fp32_precision") for backend in _BACKENDS)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within the context: no autocast on `device`, no TF32 or bfloat16 in float32 products.

    Costs about 10 microseconds, so one context goes around a loop over small products.
    """
    before = _settings()
    try:
        _set(["ieee", "ieee"] if _BY_BACKEND else ["highest"])
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _set(before)


def _settings() -> list[str]:
    if _BY_BACKEND:
        return [backend.fp32_precision for backend in _BACKENDS]
    return [torch.get_float32_matmul_precision()]


def _set(settings: Sequence[str]) -> None:
    if _BY_BACKEND:
        for backend, setting in zip(_BACKENDS, settings, strict=True):
            backend.fp32_precision = setting
    else:
        torch.set_float32_matmul_precision(settings[0])
