"""What the numbers say, in sentences: no more than their standard errors allow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import takewhile

from benchmarks.experiments.lora_summation.statistics import student_quantile
from benchmarks.experiments.orthogonal_dropout.results import AVERAGE, REAL, Mean, Measured
from benchmarks.experiments.orthogonal_dropout.settings import DIRECT, MC, ORTHOGONAL

PAIRED = ("seed", "task", "style")
BOTH = {"part": "images", "metric": "both"}


def verdict(difference: Mean) -> str:
    """'better' or 'worse' if the 95 % interval by Student's t excludes 0."""
    if difference.units < 2 or math.isnan(difference.error):
        return "not decided (too few units)"
    margin = student_quantile(0.975, difference.units - 1) * difference.error
    if abs(difference.value) <= margin or not difference.value:
        return "no difference seen"
    return "better" if difference.value > 0 else "worse"


def sentences(measured: Measured) -> list[str]:
    """One for each question that the run can answer."""
    return [
        *_orthogonality(measured),
        *_initialisation(measured),
        *_redundancy(measured),
        *_texts(measured),
    ]


def _orthogonality(measured: Measured) -> Iterator[str]:
    """Does strict orthogonality help composition?"""
    for init in measured.values("init", **BOTH, method=ORTHOGONAL):
        parts = []
        for other in (f"{MC}, K = 1", DIRECT):
            found = measured.difference(f"{ORTHOGONAL}, K = 1", other, PAIRED, **BOTH, init=init)
            if found.units:
                named = "independent masks" if other != DIRECT else "the direct merge"
                parts.append(f"against {named}: {verdict(found)} ({_signed(found)})")
        if parts:
            yield (
                f"Strict orthogonality and composition, {init} adapters (share of pictures with"
                f" both the object and the style; units are pairs x seeds): {'; '.join(parts)}."
            )


def _initialisation(measured: Measured) -> Iterator[str]:
    """What do adapters that OSRM has initialised change?"""
    inits = measured.values("init", **BOTH, method=DIRECT)
    for init in inits:
        if init == "lora" or "lora" not in inits:
            continue
        parts = []
        for label in measured.values("label", **BOTH, init=init):
            if label == REAL:
                continue
            rows = {
                key: {
                    tuple(getattr(r, k) for k in PAIRED): r.value
                    for r in measured.select(**BOTH, init=key)
                    if r.label == label
                }
                for key in (init, "lora")
            }
            units = rows[init].keys() & rows["lora"].keys()
            found = Mean.of(rows[init][unit] - rows["lora"][unit] for unit in sorted(units))
            if found.units:
                parts.append(f"{label}: {verdict(found)} ({_signed(found)})")
        yield f"{init} adapters against plain LoRA, same pairs and seeds: {'; '.join(parts)}."


def _redundancy(measured: Measured) -> Iterator[str]:
    """How much can be dropped?"""
    for kind, wanted in (
        ("texts, mean over tasks", {"task": AVERAGE}),
        ("pictures, share with the object", {"metric": "object"}),
    ):
        for dropout in measured.values("dropout", part="redundancy", **wanted):
            known = {"part": "redundancy", "dropout": dropout, **wanted}
            curve = {
                rate: measured.mean(**known, drop_rate=rate).value
                for rate in sorted(measured.values("drop_rate", **known))
            }
            whole = curve.get(0.0, math.nan)
            enough = takewhile(partial(_holds, curve), curve)
            most = max(enough, default=math.nan)
            yield (
                f"Redundancy on {kind}, trained with LoRA dropout {dropout:g}: {whole:.3f} whole;"
                f" 95 % of that up to drop rate {most:g}."
            )


def _holds(curve: Mapping[float, float], rate: float) -> bool:
    """Whether 95 % of what there is without dropout is left."""
    return curve[rate] >= 0.95 * curve.get(0.0, math.nan)


def _texts(measured: Measured) -> Iterator[str]:
    """The best of the merges."""
    known = {"part": "text", "task": AVERAGE}
    for init in measured.values("init", **known):
        means: dict[str, float] = {}
        for label in measured.values("label", **known, init=init):
            rows = [r.value for r in measured.select(**known, init=init) if r.label == label]
            means[label] = sum(rows) / len(rows)
        alone = means.pop("individual", math.nan)
        best = max(means, key=lambda label: means[label])
        yield (
            f"Texts, {init} adapters: each task with its own {alone:.3f}; the highest"
            f" merge on test rows is {best}, {means[best]:.3f}."
        )


def _signed(difference: Mean) -> str:
    error = "" if math.isnan(difference.error) else f" ± {difference.error:.3f}"
    return f"{difference.value:+.3f}{error}, n = {difference.units}"
