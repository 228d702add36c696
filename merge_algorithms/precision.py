"""Products of float32 factors in float32, whatever the program around has chosen for speed."""

from __future__ import annotations

import threading
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


class _Holders:
    """How many contexts are open, in all threads, and what the first of them found."""

    lock = threading.Lock()
    count = 0
    found: Sequence[str] = ()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within the context: no autocast on `device`, no TF32 or bfloat16 in float32 products.

    The second is a setting of the process: other threads have it too while any context is open.
    Compiled code has the program's own setting, for a graph holds none. Costs about 10
    microseconds, so one context goes around a loop over small products.
    """
    if torch.compiler.is_compiling():
        with torch.autocast(device.type, enabled=False):
            yield
        return
    _enter()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _leave()


def _enter() -> None:
    with _Holders.lock:
        if _Holders.count == 0:
            _Holders.found = _settings()
            _set(["ieee", "ieee"] if _BY_BACKEND else ["highest"])
        _Holders.count += 1


def _leave() -> None:
    with _Holders.lock:
        _Holders.count -= 1
        if _Holders.count == 0:
            _set(_Holders.found)


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
