"""Keys and values kept between decoding steps: `KVCache`, and `PagedKVCache` with shared pages."""

from __future__ import annotations

import dataclasses
import secrets
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import tracing


class CacheView(NamedTuple):
    """A cache as backends read it: keys and values 0 .. lengths[b] of each batch row."""

    k: Tensor  # (batch, kv_heads, capacity, head_dim); with a page table (pages, kv_heads, page_size, head_dim)
    v: Tensor
    page_table: Tensor | None  # (batch, n) int32: keys i * page_size on of a batch row are page page_table[b, i]
    starts: Tensor  # (batch,) int32: how many there were before this call
    lengths: Tensor  # (batch,) int32: and are now
    longest: int  # the largest of them; the capacity where they are not known, in the capture of a CUDA graph


class Rotary(NamedTuple):
    """Rotary position embedding: the cosine and sine of each position's angles.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), arXiv:2104.09864.

    The pairs (x[i], x[i + n]) of the first 2 n numbers of a head are rotated, n = cos.shape[1]; interleaved (x[2i],
    x[2i + 1]). The rest of a head stays as it is.
    """

    cos: Tensor  # (positions, n) floating
    sin: Tensor
    interleaved: bool = False


_caches: weakref.WeakValueDictionary[int, NumberedCache] = weakref.WeakValueDictionary()


class NumberedCache:
    """A cache that a graph can name, by the number in a tensor: its lengths and pages are Python's."""

    def __init__(self):
        refuse_in_graph("made")
        number = secrets.randbits(62)  # so that a program of another process finds none that is not its own
        _caches[number] = self
        self._number = torch.tensor(number, device="cpu")

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_number"}

    def __setstate__(self, state: dict) -> None:  # a copy is another cache, with a number of its own
        NumberedCache.__init__(self)
        vars(self).update(state)


def find_cache(number: int) -> NumberedCache:
    if number not in _caches:
        raise ValueError("cache must be one of this process, got one that is gone or of an exported program")
    return _caches[number]


def refuse_in_graph(what: str) -> None:
    """Refuse while a graph is traced: lengths and pages are known only when it runs."""
    if tracing.is_traced():
        raise RuntimeError(f"a cache must be {what} outside of what torch.compile traces; decode moves it on inside")


class KVCache(NumberedCache):
    """Contiguous keys and values of one layer, for a batch whose rows may differ in length.

    Args:
        batch, kv_heads, capacity, head_dim, head_dim_v: sizes; head_dim_v is head_dim by default. Memory for
            `capacity` tokens a row is taken at once.
        dtype, device: of k (batch, kv_heads, capacity, head_dim) and v (..., head_dim_v).

    `flashattn.decode` appends to it. `lengths` says how many tokens each row has.

    >>> import torch, flashattn
    >>> cache = flashattn.KVCache(batch=2, kv_heads=1, capacity=16, head_dim=8)
    >>> q, k, v = (torch.randn(2, heads, 3, 8) for heads in (4, 1, 1))
    >>> flashattn.decode(q, cache, k, v).shape, cache.lengths
    (torch.Size([2, 4, 3, 8]), [3, 3])
    """

    def __init__(
        self, batch: int, kv_heads: int, capacity: int, head_dim: int, head_dim_v: int | None = None, *,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ):  # fmt: skip
        super().__init__()
        self.k, self.v = _allocate(batch, kv_heads, capacity, head_dim, head_dim_v, dtype, device)
        self._lengths = [0] * batch

    @property
    def lengths(self) -> list[int]:
        refuse_in_graph("asked for its lengths")
        return list(self._lengths)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what lies at and past `lengths`, one number a row; 0 empties a row."""
        refuse_in_graph("truncated")
        if len(lengths) != len(self._lengths):
            raise ValueError(f"lengths must be one number for each of {len(self._lengths)} rows, got {len(lengths)}")
        for length, present in zip(lengths, self._lengths, strict=True):
            _check_length(length, present)
        self._lengths = list(lengths)

    def _reserve(self, new: list[int], k: Tensor, v: Tensor) -> CacheView:
        """Make room for so many new tokens a row in this memory, or raise before anything changes."""
        capacity, before = self.k.shape[2], self._lengths
        after = [a + b for a, b in zip(before, new, strict=True)]
        for row, length in enumerate(after):
            if length > capacity:
                raise ValueError(
                    f"cache must have room for the new tokens: row {row} has {before[row]} of {capacity}, "
                    f"{new[row]} are new"
                )
        self._lengths = after
        return _make_view(k, v, None, before, after)


class PagedKVCache(NumberedCache):
    """Keys and values of one layer in pages of a common pool, for sequences that come and go and may share pages.

    Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023).

    Args:
        pages, page_size: the pool, in pages, and tokens in a page (any number).
        kv_heads, head_dim, head_dim_v: sizes; head_dim_v is head_dim by default.
        dtype, device: of k (pages, kv_heads, page_size, head_dim) and v (..., head_dim_v).

    `add` begins a sequence and returns its number, `fork` one that shares another's tokens, `free` gives back what no
    other shares. `flashattn.decode(q, cache.select([a, b]), k, v)` appends to some of them; a page that is shared is
    copied before it is written to.

    >>> import torch, flashattn
    >>> cache = flashattn.PagedKVCache(pages=8, page_size=4, kv_heads=1, head_dim=8)
    >>> first = cache.add()
    >>> q = k = v = torch.randn(1, 1, 5, 8)
    >>> out = flashattn.decode(q, cache.select([first]), k, v)
    >>> second = cache.fork(first)
    >>> cache.length(second), cache.free_pages
    (5, 6)
    """

    def __init__(
        self, pages: int, page_size: int, kv_heads: int, head_dim: int, head_dim_v: int | None = None, *,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ):  # fmt: skip
        super().__init__()
        self.k, self.v = _allocate(pages, kv_heads, page_size, head_dim, head_dim_v, dtype, device)
        self.page_size = page_size
        self._free = list(range(pages - 1, -1, -1))  # taken from the end
        self._users = [0] * pages  # sequences that hold a page
        self._pages: dict[int, list[int]] = {}  # of each sequence
        self._lengths: dict[int, int] = {}
        self._next = 0

    @property
    def free_pages(self) -> int:
        refuse_in_graph("asked for its pages")
        return len(self._free)

    @property
    def sequences(self) -> list[int]:
        refuse_in_graph("asked for its sequences")
        return list(self._pages)

    def length(self, sequence: int) -> int:
        refuse_in_graph("asked for its lengths")
        self._check(sequence)
        return self._lengths[sequence]

    def add(self) -> int:
        """Begin an empty sequence; returns its number."""
        refuse_in_graph("given a sequence")
        return self._add_empty([], 0)

    def fork(self, sequence: int) -> int:
        """Begin a sequence with the tokens of another, whose pages they share; returns its number."""
        refuse_in_graph("forked")
        self._check(sequence)
        for page in self._pages[sequence]:
            self._users[page] += 1
        return self._add_empty(list(self._pages[sequence]), self._lengths[sequence])

    def free(self, sequence: int) -> None:
        """End a sequence; pages that no other holds can be taken again."""
        self.truncate(sequence, 0)
        del self._pages[sequence], self._lengths[sequence]

    def truncate(self, sequence: int, length: int) -> None:
        """Forget what lies at and past `length`."""
        refuse_in_graph("truncated")
        self._check(sequence)
        _check_length(length, self._lengths[sequence])
        pages, kept = self._pages[sequence], self._count_pages(length)
        for page in reversed(pages[kept:]):
            self._release_page(page)
        del pages[kept:]
        self._lengths[sequence] = length

    def select(self, sequences: Sequence[int]) -> PagedBatch:
        """These sequences as the batch of a `decode`, in this order."""
        if tracing.is_traced():  # the graph does it, and checks them, when it runs
            return PagedBatch(self, tuple(sequences))
        for sequence in sequences:
            self._check(sequence)
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"sequences must be different ones, got {list(sequences)}")
        return PagedBatch(self, tuple(sequences))

    def _check(self, sequence: int) -> None:
        if sequence not in self._pages:
            raise ValueError(f"sequence must be one of the cache's {self.sequences}, got {sequence!r}")

    def _add_empty(self, pages: list[int], length: int) -> int:
        sequence, self._next = self._next, self._next + 1
        self._pages[sequence], self._lengths[sequence] = pages, length
        return sequence

    def _count_pages(self, length: int) -> int:
        return -(-length // self.page_size)

    def _release_page(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page] == 0:
            self._free.append(page)

    def _alloc_page(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _has_shared_last_page(self, sequence: int, new: int) -> bool:
        """Whether new tokens go to a partly filled last page that other sequences share."""
        length = self._lengths[sequence]
        return new > 0 and length % self.page_size > 0 and self._users[self._pages[sequence][-1]] > 1

    def _find_copies(self, sequences: Sequence[int], new: list[int]) -> list[int]:
        """The sequences whose last page has to be copied. The last of those that share one may keep it."""
        wanted = [s for s, n in zip(sequences, new, strict=True) if self._has_shared_last_page(s, n)]
        users = {self._pages[s][-1]: self._users[self._pages[s][-1]] for s in wanted}
        copies = []
        for sequence in wanted:
            page = self._pages[sequence][-1]
            if users[page] > 1:
                users[page] -= 1
                copies.append(sequence)
        return copies

    def _reserve(self, sequences: Sequence[int], new: list[int], k: Tensor, v: Tensor) -> CacheView:
        """Make room for so many new tokens each in this memory, or raise before anything changes."""
        before = [self._lengths[s] for s in sequences]
        after = [a + b for a, b in zip(before, new, strict=True)]
        copies = self._find_copies(sequences, new)
        needed = len(copies) + sum(
            self._count_pages(n) - len(self._pages[s]) for s, n in zip(sequences, after, strict=True)
        )
        if needed > len(self._free):
            raise ValueError(
                f"cache must have room for the new tokens: they need {needed} pages of {self.page_size}, "
                f"{len(self._free)} are free"
            )
        for sequence in copies:
            self._copy_last_page(sequence, k, v)
        for sequence, length in zip(sequences, after, strict=True):
            pages = self._pages[sequence]
            pages.extend(self._alloc_page() for _ in range(self._count_pages(length) - len(pages)))
            self._lengths[sequence] = length
        tables = [self._pages[s] for s in sequences]
        width = max([1, *map(len, tables)])
        table = to_int32(self.k.device, [pages + [0] * (width - len(pages)) for pages in tables])
        return _make_view(k, v, table.view(len(tables), width), before, after)

    def _copy_last_page(self, sequence: int, k: Tensor, v: Tensor) -> None:
        shared, own = self._pages[sequence][-1], self._alloc_page()
        k[own], v[own] = k[shared], v[shared]
        self._pages[sequence][-1] = own
        self._release_page(shared)


@dataclasses.dataclass
class PagedBatch:
    """Some sequences of a `PagedKVCache`, as the batch of a `decode`."""

    cache: PagedKVCache
    sequences: tuple[int, ...]

    @property
    def k(self) -> Tensor:
        return self.cache.k

    @property
    def v(self) -> Tensor:
        return self.cache.v

    @property
    def lengths(self) -> list[int]:
        return [self.cache.length(s) for s in self.sequences]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what lies at and past `lengths`, one number a sequence."""
        for sequence, length in zip(self.sequences, lengths, strict=True):
            self.cache.truncate(sequence, length)

    def _reserve(self, new: list[int], k: Tensor, v: Tensor) -> CacheView:
        return self.cache._reserve(self.sequences, new, k, v)


def _allocate(rows, kv_heads, seq, head_dim, head_dim_v, dtype, device) -> tuple[Tensor, Tensor]:
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    for name, size in (("kv_heads", kv_heads), ("head_dim", head_dim), ("head_dim_v", head_dim_v), ("page_size", seq)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be at least 1, got {size!r}")
    k, v = (torch.empty(rows, kv_heads, seq, dim, dtype=dtype, device=device) for dim in (head_dim, head_dim_v))
    return k, v


def _check_length(length: int, present: int) -> None:
    if not 0 <= length <= present:
        raise ValueError(f"length must be between 0 and the {present} tokens that are there, got {length}")


def _make_view(k: Tensor, v: Tensor, page_table: Tensor | None, before: list[int], after: list[int]) -> CacheView:
    starts, lengths = to_int32(k.device, (before, after)).unbind()
    return CacheView(k, v, page_table, starts, lengths, max(after, default=0))


def to_int32(device: torch.device, numbers: Sequence) -> Tensor:
    """Python's numbers as a tensor on the device. A GPU gets them from pinned memory, without a synchronisation."""
    on_cpu = torch.tensor(numbers, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    return on_cpu.to(device, non_blocking=True)
