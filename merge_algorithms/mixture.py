"""What a run-time merge adds to a module: its adapters' outputs, chosen element by element.

A mask is a range of random words: adapter j owns the elements whose word lies in its range, so one
word per element decides between any number of adapters. Words are integers of 8 or 16 bits where
these hold every probability to within 1e-4 of its value (and exactly at the default rates of 2, 4
or 8 adapters), else of 32 bits: on a CPU drawing them is most of what a mask costs, and torch's
generator yields eight words of 8 bits in little more time than one float. Independent masks of one
probability a / q can go by one word, for some q: times q, its next digit to base q comes up front.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, partial
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import linear

from merge_algorithms.adapter import LowRank
from merge_algorithms.errors import UserError

Group = tuple[int, ...]
"""Adapters, by index, whose outputs are added up; empty: nobody's."""
Owners = tuple[tuple[int, Group], ...]
"""Ascending (first word, group): who owns the elements from that word on."""
Part = tuple[Tensor, Tensor | None]
"""What is added, and the mask that it is still to be multiplied by."""
Outer = Callable[[int, Tensor], Tensor]

TOLERANCE = 1e-4
INDEPENDENCE = 1e-3
# Most elements that one step works on, so that its few tensors of this size stay in the processor's
# cache. Smaller steps cost more in calls than they save, all the more with several threads.
BLOCK = 1 << 18
# At least so many steps by the bits of a word for each byte of an output's element (else 4): the
# words and a step's three tensors together take at most one output more than stock PEFT does.
STEPS = {1: 2, 2: 2, 4: 3}
# Outputs up to here are made in one step.
SMALL = 1 << 16
_WORDS = {8: torch.int8, 16: torch.int16, 32: torch.int32}


class Words:
    """A source of random words; one object per module.

    Args:
        generator: Makes the generator that the words come from on a device, once per device; by
            default torch's own generator is read, as by torch.nn.Dropout, so that activation
            checkpointing draws the same masks again.
    """

    def __init__(self, generator: Callable[[torch.device], torch.Generator] | None = None) -> None:
        self._make = generator
        self._generators: dict[torch.device, torch.Generator] = {}
        self.key = next(_keys)
        _seeded[self.key] = self

    def draw(self, like: Tensor, bits: int) -> Tensor:
        """Uniform words, int8, int16 or int32 over their whole range, of the shape of `like`."""
        if not torch.compiler.is_compiling():
            return self.now(like, bits)
        if self._make is not None:
            return _draw_seeded(like.detach(), bits, self.key)
        half = 1 << (bits - 1)
        return torch.randint(-half, half, like.shape, dtype=_WORDS[bits], device=like.device)

    def now(self, like: Tensor, bits: int) -> Tensor:
        """The same, at once: `draw` for code that is not traced."""
        shape, per_draw = like.shape, 64 // bits
        count, columns = math.prod(shape), shape[-1]
        whole = columns % per_draw == 0  # then the draws have the shape's other dimensions
        size = [*shape[:-1], columns // per_draw] if whole else [-(-count // per_draw)]
        drawn = torch.empty(size, dtype=torch.int64, device=like.device)
        drawn.random_(-(1 << 63), None, generator=self._generator(like.device))
        words = drawn.view(_WORDS[bits])
        return words if whole else words[:count].view(shape)

    def below(self, limit: int, like: Tensor, bits: int, *more: int) -> Tensor:
        """Whether words are, as unsigned ones, below the limit; with leading dimensions `more`.

        On a GPU this takes one call, drawing words and comparing them three.
        """
        below = torch.empty((*more, *like.shape), dtype=torch.bool, device=like.device)
        return below.bernoulli_(limit / 2**bits, generator=self._generator(like.device))

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self._make is None:
            return None
        if device not in self._generators:
            self._generators[device] = self._make(device)
        return self._generators[device]


_keys = itertools.count()
_seeded: WeakValueDictionary[int, Words] = WeakValueDictionary()


# torch.compile cannot trace a generator, so a compiled model calls it through this operator.
@torch.library.custom_op(
    "osrm::random_words", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _draw_seeded(like: Tensor, bits: int, key: int) -> Tensor:
    return _seeded[key].now(like, bits)


@_draw_seeded.register_fake
def _(like: Tensor, bits: int, key: int) -> Tensor:
    return like.new_empty(like.shape, dtype=_WORDS[bits])


FRESH = Words()


@dataclass(frozen=True)
class Mixture:
    """A sum of passes; in each pass every element is owned by one group of adapters, or nobody.

    Attributes:
        updates: T updates of one module; those of rank 0 leave it alone.
        factors: T numbers that the adapters' outputs are multiplied by.
        passes: Each goes by random words, one per element; those of one probability can share them.
        bits: Length of the words.
        words: Where they come from.
    """

    updates: tuple[LowRank, ...]
    factors: tuple[float, ...]
    passes: tuple[Owners, ...]
    bits: int = 8
    words: Words = FRESH

    def restricted(self) -> Mixture:
        """The same without the adapters that leave the module alone; nobody owns their elements."""
        found = (_pruned(owners, self.updates) for owners in self.passes)
        return replace(self, passes=tuple(owners for owners in found if owners != ((0, ()),)))

    def onto(self, output: Tensor, x: Tensor) -> Tensor:
        """The output (..., d_out) of a linear module plus what the adapters make of its input x.

        Computed in the factors' dtype, rounded once to the output's.
        """
        a, bs = self.stacked
        inner = linear(x.to(a.dtype), a).split_with_sizes([b.shape[1] for b in bs], dim=-1)
        return self.combine(output, inner, lambda t, z: linear(z, bs[t]))

    @cached_property
    def stacked(self) -> tuple[Tensor, list[Tensor]]:
        """All A_t in one matrix, and factor_t B_t. Compiled code reads it, but cannot make it."""
        a = torch.cat([update.a for update in self.updates])
        return a, [u.b * factor for u, factor in zip(self.updates, self.factors, strict=True)]

    def combine(
        self,
        output: Tensor,
        inner: Sequence[Tensor],
        outer: Outer,
        dim: int | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """`output` plus `scale` times the masked outputs of the adapters, in the dtype of `output`.

        Where no gradient is recorded a CPU makes large outputs in blocks, so that beside the
        result only the random words are as large as they. A GPU makes them in one step: there the
        number of calls is what takes time.

        Args:
            output: Of the base module.
            inner: A_t x by adapter, r_t in place of d_out; anything for adapters without a part.
            outer: From an adapter's index and (a slice of) its A_t x to w_t / (1 - p_t) o_t.
            dim: A dimension along which `outer` may be given slices; by default all but the last,
                as one.
            scale: What all outputs are multiplied by, for nothing: the sum does it.
        """
        gpu, recorded = _on_gpu(output), _recorded()
        if gpu or recorded or output.numel() <= SMALL:
            # Compiled code has no calls to save, and dynamo cannot read a cached property.
            few = gpu and not torch.compiler.is_compiling() and self._limits
            parts = self._in_few_calls if few else self._one_by_one
            total = output
            for part in parts(output, inner, outer):
                own = total is not output and total.dtype == part[0].dtype
                total = _plus(total, part, scale, total if own and not recorded else None)
                del part  # whose memory the next one needs
            return total if total.dtype == output.dtype else total.to(output.dtype)
        if dim is not None:
            return self._in_blocks(output, inner, outer, dim, scale)
        rows = output.reshape(-1, output.shape[-1])
        inner = [z.reshape(len(rows), z.shape[-1]) for z in inner]  # of rank 0 too
        return self._in_blocks(rows, inner, outer, 0, scale).reshape(output.shape)

    def _one_by_one(self, like: Tensor, inner: Sequence[Tensor], outer: Outer) -> Iterator[Part]:
        for owners, words in self._drawn(like):
            yield _select(owners, words, inner, outer)

    def _in_few_calls(self, like: Tensor, inner: Sequence[Tensor], outer: Outer) -> Iterator[Part]:
        """The same on a GPU where every pass has two ranges: masks without words.

        Those of three passes are drawn at once, which together are smaller than a float32 output.
        """
        for start in range(0, len(self.passes), 3):
            limits = self._limits[start : start + 3]
            if len(limits) > 1 and len(set(limits)) == 1:
                masks = self.words.below(limits[0], like, self.bits, len(limits)).unbind()
            else:
                masks = tuple(self.words.below(limit, like, self.bits) for limit in limits)
            passes = self.passes[start : start + 3]
            for ((_, first), (_, second)), mask in zip(passes, masks, strict=True):
                yield _either(mask, _sum(first, inner, outer), _sum(second, inner, outer))
                del mask
            del masks

    @cached_property
    def _limits(self) -> tuple[int, ...]:
        return _changes(self.passes)

    def _in_blocks(
        self, output: Tensor, inner: Sequence[Tensor], outer: Outer, dim: int, scale: float
    ) -> Tensor:
        size = output.shape[dim]
        steps = STEPS.get(self.bits // output.element_size(), 4)
        step = max(1, min(BLOCK * size // output.numel(), size // steps))
        # Between passes nothing is rounded to half precision.
        wide = [z.dtype for z in inner] if len(self.passes) > 1 else []
        dtype = functools.reduce(torch.promote_types, wide, output.dtype)
        total, result = output, torch.empty_like(output, dtype=dtype)
        for owners, words in self._drawn(output):
            for start in range(0, size, step):
                cut = partial(torch.narrow, dim=dim, start=start, length=min(step, size - start))
                here = None if words is None else cut(words)
                part = _select(owners, here, [cut(z) for z in inner], outer)
                _plus(cut(total), part, scale, cut(result))
                del part, here  # whose memory the next ones need
            total = result
            del words
        return total.to(output.dtype)

    def _drawn(self, like: Tensor) -> Iterator[tuple[Owners, Tensor | None]]:
        """The passes, and the words that each goes by."""
        base, digits = _digits(_changes(self.passes), self.bits)
        words: Tensor | None = None
        for number, owners in enumerate(self.passes):
            if words is not None and number % digits:
                words.mul_(base)  # modulo the number of words
            else:
                words = None  # no two draws at a time
                words = self.words.draw(like, self.bits) if len(owners) > 1 else None
            yield owners, words


def _digits(limits: Sequence[int], bits: int) -> tuple[int, int]:
    """(q, n): one word does for n passes, and times q it is ready for the next; (1, 1) if for one.

    Where every pass changes owners at a / q of the words, it asks whether a word's first digit to
    base q is less than a. Digits to a power of two are bits of their own. An odd q permutes the
    words, so that every pass meets uniform ones; probabilities of several digits are right to
    within q^n / 2^bits, at most INDEPENDENCE, of themselves. Times another q words would repeat.

    Args:
        limits: Where each pass changes owners, in words of that many bits.
    """
    if len(limits) < 2 or len(set(limits)) > 1 or bits > 16:  # compilers assume int32 does not wrap
        return 1, 1
    share = Fraction(limits[0], 2**bits).limit_denominator(16)
    q = share.denominator
    if q == 1 or round(share * 2**bits) != limits[0]:
        return 1, 1
    if q & (q - 1) == 0:
        return q, bits // (q.bit_length() - 1)
    return (q, max(1, int(math.log(INDEPENDENCE * 2**bits, q)))) if q % 2 else (1, 1)


def _changes(passes: tuple[Owners, ...]) -> tuple[int, ...]:
    """Where each pass changes owners; () unless all do so once, and begin with a group."""
    two = all(len(owners) == 2 and owners[0][1] for owners in passes)
    return tuple(owners[1][0] for owners in passes) if two else ()


def _pruned(owners: Owners, updates: Sequence[LowRank]) -> Owners:
    kept: list[tuple[int, Group]] = []
    for start, group in owners:
        here = tuple(t for t in group if updates[t].rank)
        if not kept or here or kept[-1][1]:
            kept.append((start, here))
    return tuple(kept)


def _select(owners: Owners, words: Tensor | None, inner: Sequence[Tensor], outer: Outer) -> Part:
    """The owners' outputs. At least one group is not empty.

    On a CPU masks are floats, exactly 0 or 1: arithmetic with them is far faster than with bools,
    and exact as long as the outputs are finite (0 * inf would be NaN). On a GPU, and in compiled
    code, they are bools, a quarter of the memory.
    """
    total: Tensor | None = None
    mask: Tensor | None = None
    last = len(owners) - 1
    for number, (start, group) in enumerate(owners):
        output = _sum(group, inner, outer)
        if words is None or (start == 0 and output is not None):
            total = output
            continue
        if total is not None and output is not None and output.dtype != total.dtype:
            output = output.to(total.dtype)
        like = output if total is None else total
        if like is None:
            continue  # nobody owns the first words
        mask = _mask(torch.lt if output is None else torch.ge, words, start, like, mask)
        if total is None or output is None:
            if number == last:
                return like, mask  # the sum multiplies by it for nothing
            total = like.mul_(mask)
        elif mask.dtype == torch.bool:
            into = None if _recorded() else total
            total = torch.where(mask, output, total, out=into)
            mask = None
        else:
            total = total.lerp_(output, mask)
        del output, like  # whose memory the next ones need
    assert total is not None
    return total, None


def _either(mask: Tensor, first: Tensor | None, second: Tensor | None) -> Part:
    """The first where the mask of bools says so and the second, if there is one, elsewhere."""
    assert first is not None
    if second is None:
        return first, mask
    into = None if _recorded() else first
    return torch.where(mask, first, second.to(first.dtype), out=into), None


def _sum(group: Group, inner: Sequence[Tensor], outer: Outer) -> Tensor | None:
    total: Tensor | None = None
    for t in group:
        part = outer(t, inner[t])
        if total is None:
            total = part
        else:
            total = total.add_(part) if total.dtype == part.dtype else total + part
        del part  # whose memory the next one needs
    return total


def _plus(total: Tensor, part: Part, scale: float, out: Tensor | None) -> Tensor:
    added, mask = part
    if mask is None:
        return torch.add(total, added, alpha=scale, out=out)
    return torch.addcmul(total, added, mask, value=scale, out=out)


def _mask(
    compare: Callable[..., Tensor], words: Tensor, start: int, like: Tensor, used: Tensor | None
) -> Tensor:
    """Where the comparison with word number `start` holds, as bools, or as 1 and 0 of the dtype of
    `like`; those may overwrite `used`.
    """
    limit = start - (1 << (8 * words.itemsize - 1))
    if _on_gpu(words) or torch.compiler.is_compiling():
        return compare(words, limit)
    if used is None or torch.is_grad_enabled():  # the backward pass needs all of them
        used = torch.empty_like(like, requires_grad=False)
    return compare(words, limit, out=used)


def _recorded() -> bool:
    """Whether what is computed is kept for a backward pass or a compiler."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def word_limits(edges: Sequence[float]) -> tuple[int, list[int]]:
    """Bits of the words, and the edges in words, that stand for probabilities from edge to edge.

    Args:
        edges: Ascending from 0 to at most 1.

    Raises:
        UserError: A probability that words of 32 bits cannot hold.
    """
    for bits in _WORDS:
        limits = [round(edge * 2**bits) for edge in edges]
        pairs = zip(itertools.pairwise(limits), itertools.pairwise(edges), strict=True)
        if all(
            abs((end - start) / 2**bits - (high - low)) <= TOLERANCE * (high - low)
            for (start, end), (low, high) in pairs
        ):
            return bits, limits
    least = min(high - low for low, high in itertools.pairwise(edges))
    raise UserError(
        f"a drop rate of {1 - least:.9g} is so near 1 that its adapter would hardly ever speak:"
        " give at most 0.99999"
    )
