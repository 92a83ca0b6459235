"""A validated call: named sizes, formats and strides, and nothing that changes between calls of the same kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .formats import Q_DTYPES, format_of_dtype, kv_format
from .layouts import KV_LAYOUTS, check_kv_layout, to_nhd

#: head_dim is any multiple of 16 up to this.
MAX_HEAD_DIM = 256
#: Query heads per cache head.
MAX_GROUP_SIZE = 128
#: Rows start at multiples of this many bytes.
ROW_ALIGNMENT = 16
#: Rows of a request: row numbers, and a step beyond them, fit 32 bits.
MAX_KV_LEN = 2**31 - 2**24
#: Limits of what the copy engine (TMA) can describe: bytes of a step, rows of a box.
MOST_BOX_STRIDE = 2**40
MOST_BOX_ROWS = 256
#: Bytes from one token's row to the next, which the kernels keep in 32 bits.
MAX_ROW_STRIDE = 2**31 - 16


class Facts(NamedTuple):
    """What the array boundary reads off an array. ``strides`` are in bytes, ``device`` is -1 for the host."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: int
    library: str

    def is_contiguous(self, itemsize: int) -> bool:
        """Whether the elements follow each other in C order."""
        step = itemsize
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != step:
                return False
            step *= size
        return True


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of an array in C order."""
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Paging:
    """What a paged cache has beside its strides."""

    page_size: int
    num_pages: int
    max_rows: int  # of a request; lengths on the device are cut to it
    block_table_stride: int  # entries from one request's to the next's, in a block table


@dataclass(frozen=True)
class DecodeProblem:
    """Attention of query tokens over a cache: one a request, or ``queries`` at most that see the same rows.

    Strides in bytes, cache axes in NHD order without the last. Of a paged cache ``kv_len`` is the length to plan for,
    and the first axis of its strides is that of the pages.
    """

    batch: int
    kv_len: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    q_format: str
    k_format: str
    v_format: str
    q_strides: tuple[int, int]
    k_strides: tuple[int, int, int]
    v_strides: tuple[int, int, int]
    soft_cap: bool = False
    window: int = -1  # rows that the window lets through, -1: all
    position: str = "NONE"
    ragged: bool = False  # lengths of their own for the requests
    queries: int = 1  # rows of q that see the same rows of K and V, of a request at most
    paging: Paging | None = None

    @property
    def layout(self) -> str:
        """The name in ``layouts.LAYOUTS``."""
        return "paged" if self.paging else "padded"

    @property
    def max_rows(self) -> int:
        """Rows that a request has at most."""
        return self.paging.max_rows if self.paging else self.kv_len

    @property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads

    @property
    def columns(self) -> int:
        """Queries of a cache head: those of its group, of every row of q of a request."""
        return self.group_size * self.queries

    @property
    def rows_read(self) -> int:
        """Rows of the longest request that a query can see."""
        return self.kv_len if self.window < 0 else min(self.kv_len, self.window)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of K and one of V."""
        return self.head_dim * sum(kv_format(name).itemsize for name in (self.k_format, self.v_format))

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that a full-length batch reads."""
        return self.batch * self.rows_read * self.num_kv_heads * self.row_bytes

    @property
    def can_copy_boxes(self) -> bool:
        """Whether the copy engine can step through both caches: no axis backwards, in place or in very long steps."""
        outer, rows = (self.paging.num_pages, self.paging.page_size) if self.paging else (self.batch, self.kv_len)
        sizes = (outer, rows, self.num_kv_heads)
        return all(
            size < 2 or 0 < stride < MOST_BOX_STRIDE
            for strides in (self.k_strides, self.v_strides)
            for size, stride in zip(sizes, strides, strict=True)
        )

    def __str__(self) -> str:
        pages = f" in pages of {self.paging.page_size}" if self.paging else ""
        return (
            f"{self.batch} requests of {self.kv_len} rows{pages}, {self.num_qo_heads}/{self.num_kv_heads} heads of "
            f"{self.head_dim}, q {self.q_format}, k {self.k_format}, v {self.v_format}"
        )


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


class SizeBinder:
    """Binds named sizes across arrays, so that an error names the array, the axis, what was expected and what came."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[int, str]] = {}

    def bind(self, argument: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> None:
        if len(shape) != len(axes):
            raise ValueError(
                f"{argument}: expected {len(axes)} axes [{', '.join(axes)}], got {len(shape)}: {_shape(shape)}"
            )
        for axis, size in zip(axes, shape, strict=True):
            known, source = self._sizes.setdefault(axis, (size, argument))
            if known != size:
                raise ValueError(
                    f"{argument}: expected {axis} = {known} as in {source}, got {size}; shape {_shape(shape)} is "
                    f"read as [{', '.join(axes)}]"
                )

    def __getitem__(self, axis: str) -> int:
        return self._sizes[axis][0]


def check_rows(argument: str, facts: Facts, itemsize: int) -> None:
    """Rows (the last axis) must be contiguous and multiples of 16 bytes apart; ValueError otherwise."""
    if 0 in facts.shape:
        return
    if facts.shape[-1] > 1 and facts.strides[-1] != itemsize:
        raise ValueError(
            f"{argument}: expected a contiguous last axis (a stride of {itemsize} bytes), got strides "
            f"{_shape(facts.strides)} in bytes; make it contiguous first"
        )
    for size, stride in zip(facts.shape[:-1], facts.strides[:-1], strict=True):
        if size > 1 and stride % ROW_ALIGNMENT:
            raise ValueError(
                f"{argument}: expected rows at multiples of {ROW_ALIGNMENT} bytes, got strides "
                f"{_shape(facts.strides)} in bytes"
            )


def without_idle_strides(facts: Facts) -> Facts:
    """Axes of one element are never stepped along, and libraries give them any stride."""
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(facts.shape, facts.strides, strict=True))
    return facts._replace(strides=strides)


def check_address(argument: str, address: int) -> None:
    if address % ROW_ALIGNMENT:
        raise ValueError(
            f"{argument}: expected data that starts at a multiple of {ROW_ALIGNMENT} bytes, got address {address:#x}"
        )


def formats_of(k: Facts, v: Facts, requested: object, arguments: tuple[str, str] = ("k", "v")) -> tuple[str, str]:
    """The formats of K and V: what ``kv_format`` says of uint8 codes, otherwise what the dtypes carry."""
    pair = requested if isinstance(requested, (tuple, list)) else (requested, requested)
    if len(pair) != 2:
        raise ValueError(f"kv_format: expected one format or a pair (K, V), got {requested!r}")
    names = []
    for argument, facts, wanted in zip(arguments, (k, v), pair, strict=True):
        carried = format_of_dtype(facts.dtype, argument)
        if wanted is not None:
            asked = kv_format(wanted)
            codes = facts.dtype == "uint8" and asked.is_fp8
            if not codes and asked != carried:
                raise ValueError(f"kv_format: {asked.name} asked for, but {argument} is an array of {facts.dtype}")
            carried = asked
        names.append(carried.name)
    return names[0], names[1]


def check_heads(hq: int, hkv: int, head_dim: int) -> None:
    """ValueError for numbers of heads, or a head_dim, that no kernel has."""
    if hkv < 1 or hq < 1 or hq % hkv:
        raise ValueError(f"q: expected num_qo_heads to be a positive multiple of num_kv_heads = {hkv}, got {hq}")
    if hq // hkv > MAX_GROUP_SIZE:
        raise ValueError(f"q: expected at most {MAX_GROUP_SIZE} query heads per cache head, got {hq // hkv}")
    if not 0 < head_dim <= MAX_HEAD_DIM or head_dim % 16:
        raise ValueError(f"q: expected a head_dim that is a multiple of 16 up to {MAX_HEAD_DIM}, got {head_dim}")


def bind_decode(
    q: Facts,
    k: Facts,
    v: Facts,
    *,
    batched: bool,
    kv_layout: str = "NHD",
    requested_format: object = None,
    soft_cap: bool = False,
    window_left: int = -1,
    position: str = "NONE",
    ragged: bool = False,
) -> DecodeProblem:
    """Check that the arrays of a decode call fit together. Raises TypeError or ValueError naming what does not."""
    check_kv_layout(kv_layout)
    if q.dtype not in Q_DTYPES:
        raise TypeError(f"q: expected {' or '.join(Q_DTYPES)}, got {q.dtype}")
    k_format, v_format = formats_of(k, v, requested_format)
    lead = ("batch",) if batched else ()
    rows = ("kv_len", "num_kv_heads") if KV_LAYOUTS[kv_layout][0] == 0 else ("num_kv_heads", "kv_len")
    sizes = SizeBinder()
    sizes.bind("q", q.shape, (*lead, "num_qo_heads", "head_dim"))
    sizes.bind("k", k.shape, (*lead, *rows, "head_dim"))
    sizes.bind("v", v.shape, (*lead, *rows, "head_dim"))
    hq, hkv, head_dim = sizes["num_qo_heads"], sizes["num_kv_heads"], sizes["head_dim"]
    check_heads(hq, hkv, head_dim)
    if sizes["kv_len"] > MAX_KV_LEN:
        raise ValueError(f"k: expected at most {MAX_KV_LEN} rows a request, got {sizes['kv_len']}")
    # Strides of the axes (batch, row, head) that the kernels know; a single request's batch axis is never stepped.
    q, k, v = (without_idle_strides(facts) for facts in (q, k, v))
    no_batch: tuple[int, ...] = () if batched else (0,)
    q_request, q_head = (*no_batch, *q.strides[:-1])
    k_request, k_row, k_head = (*no_batch, *to_nhd(k.strides, kv_layout)[:-1])
    v_request, v_row, v_head = (*no_batch, *to_nhd(v.strides, kv_layout)[:-1])
    for argument, stride in (("k", k_row), ("v", v_row)):
        if abs(stride) > MAX_ROW_STRIDE:
            raise ValueError(f"{argument}: expected rows at most {MAX_ROW_STRIDE} bytes apart, got {stride}")
    return DecodeProblem(
        batch=sizes["batch"] if batched else 1, kv_len=sizes["kv_len"], num_qo_heads=hq, num_kv_heads=hkv,
        head_dim=head_dim, q_format=kv_format(q.dtype).name, k_format=k_format, v_format=v_format,
        q_strides=(q_request, q_head),
        k_strides=(k_request, k_row, k_head), v_strides=(v_request, v_row, v_head), soft_cap=soft_cap,
        window=window_left + 1 if window_left >= 0 else -1, position=position, ragged=ragged,
    )  # fmt: skip
