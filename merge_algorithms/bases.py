"""Which base model adapters were trained on, and whether it is one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from merge_algorithms.adapter import Adapter
from merge_algorithms.errors import UserError


def common_base(adapters: Sequence[Adapter]) -> str | None:
    """The base model that the adapters record, by the first of its names; None if none does.

    Two names are one model's if they lead to one local directory, or if adapters that record them
    have one fingerprint of the model in osrm.json.

    Raises:
        UserError: The adapters record different base models; or one name but different
            fingerprints or, where not all record a fingerprint, different revisions.
    """
    models: list[set[str]] = []  # of each model, what it is known by
    for adapter in adapters:
        if marks := _marks(adapter):
            same = [known for known in models if known & marks]
            models = [known for known in models if not known & marks] + [marks.union(*same)]
    if len(models) > 1:
        first, second = (next(a for a in adapters if _marks(a) & known) for known in models[:2])
        raise _different(first, str(first.base), second, str(second.base))
    for what, recorded in (
        ("fingerprint", [adapter.base_fingerprint for adapter in adapters]),
        ("revision", [adapter.config.get("revision") for adapter in adapters]),
    ):
        owners = {mark: a for mark, a in zip(recorded, adapters, strict=True) if mark}
        if len(owners) > 1:
            (mark, first), (other, second), *_ = owners.items()
            base = f"{first.base or 'a model'} of {what} {mark}"
            raise _different(first, base, second, f"one of {what} {other}")
        if all(recorded):
            break
    return next((adapter.base for adapter in adapters if adapter.base), None)


def base_revision(adapters: Sequence[Adapter], base: str | None) -> str | None:
    """The revision of the base model called `base`: the first that adapters record of it."""
    revisions = (adapter.config.get("revision") for adapter in adapters if adapter.base == base)
    return next(filter(None, revisions), None)


def _marks(adapter: Adapter) -> set[str]:
    """What tells the base model of an adapter from others; empty if it is not recorded."""
    if not adapter.base:
        return set()
    fingerprint, place = adapter.base_fingerprint, adapter.base
    with suppress(OSError):  # longer than a path can be
        place = str(Path(place).resolve()) if Path(place).is_dir() else place
    return {place, f"fingerprint {fingerprint}"} if fingerprint else {place}


def _different(first: Adapter, base: str, second: Adapter, other: str) -> UserError:
    return UserError(
        f"adapter '{first.name}' was trained on {base} but '{second.name}' on {other}: only"
        " adapters of one base model can be merged; if these are one model, settle on its name by"
        " Adapter.on_base(name), or --base (osrm eval: --model) on the command line"
    )
