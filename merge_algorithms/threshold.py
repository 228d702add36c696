"""Exact order statistics over updates that are never held.

The threshold that keeps the n largest entries of an adapter is found in one pass over them: a
random sample brackets it, the pass counts the entries above the bracket and collects those inside,
about one in a hundred, and the sought one is picked from these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from merge_algorithms.adapter import LowRank
from merge_algorithms.precision import full_precision
from merge_algorithms.tiles import row_tiles

# The bracket is this many standard errors of the sample wide, to either side.
_MARGIN = 5.0
# Entries are counted in chunks of this many, and chunks without one in the bracket passed over.
_CHUNK = 16


def top_threshold(updates: Sequence[LowRank], keep: int) -> float:
    """A threshold t such that |x| > t holds for the `keep` largest entries and for no other.

    Entries that equal the smallest of these are kept with it, zeros never. Magnitudes are
    compared in float32. The result lies midway between the smallest magnitude that is kept and
    the next smaller one, so that rounding (another basis of the factors) does not move an entry
    across it. It is exact whatever the sample; in memory there are a tile and the entries inside
    the bracket.

    Args:
        updates: The updates that are trimmed together.
        keep: How many entries to keep, at least 1; 0 is returned if there are no more than that
            which are not 0.
    """
    total = sum(math.prod(update.shape) for update in updates)
    if keep >= total:
        return 0.0
    sample = _sample(updates, min(total, int(3 * total ** (2 / 3))))
    share, margin = keep / total, _MARGIN
    while True:
        low, high = _bracket(sample, share, margin)
        above, inside = _survey(updates, low, high)
        rank = keep - above
        if 1 <= rank <= len(inside):
            break
        if low == 0 and rank > len(inside):
            return 0.0
        margin *= 4
    kept = inside.kthvalue(len(inside) - rank + 1).values
    smaller = inside[inside < kept]
    dropped = float(smaller.max()) if smaller.numel() else low
    middle = torch.tensor((float(kept) + dropped) / 2, dtype=torch.float32).item()
    return middle if middle < float(kept) else dropped


def _sample(updates: Sequence[LowRank], count: int) -> Tensor:
    """Magnitudes of about `count` entries: random rows of every column of every update."""
    total = sum(math.prod(update.shape) for update in updates)
    generator = torch.Generator().manual_seed(0)
    magnitudes = []
    for update in updates:
        d_out, d_in = update.shape
        repeats = max(1, round(count * d_out / total))
        rows = torch.randint(d_out, (repeats, d_in), generator=generator).to(update.b.device)
        for start, stop in row_tiles((repeats, d_in * update.rank), copies=2):
            products = update.b[rows[start:stop]] * update.a.T
            magnitudes.append(products.sum(-1).abs().float().flatten())
    return torch.cat(magnitudes)


def _bracket(sample: Tensor, share: float, margin: float) -> tuple[float, float]:
    """Magnitudes (low, high] between which lies the one that a share of all entries reaches."""
    count = len(sample)
    spread = margin * math.sqrt(count * share * (1 - share)) + margin
    first, last = math.floor(count * share - spread), math.ceil(count * share + spread)
    high = float(sample.kthvalue(count - first).values) if first >= 0 else math.inf
    low = float(sample.kthvalue(count - last).values) if last < count else 0.0
    return low, high


def _survey(updates: Sequence[LowRank], low: float, high: float) -> tuple[int, Tensor]:
    """How many magnitudes exceed the bracket, and those inside it, float32."""
    ones = torch.ones(_CHUNK, dtype=torch.float32, device=updates[0].b.device)
    above, inside = 0, [ones[:0]]
    with full_precision(ones.device):
        for chunks in _chunks(updates):
            # Comparisons into float tensors and sums of small integers: exact, and on a CPU
            # several times as fast as booleans, which matters as every entry passes here.
            exceeding = torch.empty_like(chunks)
            over_high = torch.gt(chunks, high, out=exceeding) @ ones
            over_low = torch.gt(chunks, low, out=exceeding) @ ones
            above += int(over_high.sum())
            near = chunks[over_low != over_high].flatten()
            inside.append(near[(near > low) & (near <= high)])
    return above, torch.cat(inside)


def _chunks(updates: Sequence[LowRank]) -> Iterator[Tensor]:
    """All magnitudes but those of zero updates, as float32 (n, _CHUNK), filled up with zeros."""
    for update in updates:
        if not update.rank:
            continue
        for start, stop in row_tiles(update.shape, copies=2):
            magnitudes = (update.b[start:stop] @ update.a).abs_().float().flatten()
            rest = -len(magnitudes) % _CHUNK
            if rest:
                magnitudes = torch.cat([magnitudes, magnitudes.new_zeros(rest)])
            yield magnitudes.view(-1, _CHUNK)
