"""The field's example on what the machine has: how exact, how much smaller, how fast."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.text import Text

from . import terminal
from .backends import reference
from .bench.inputs import relative_l2
from .bench.report import TOLERANCES
from .decode import batch_decode_with_padded_kv_cache
from .formats import F16, KV_FORMATS, KVFormat
from .jit.device import cupy_problem, device_info, has_gpu, require_cupy
from .problem import Facts, bind_decode

#: Wall times are repeated until this many seconds are spent.
_MOST_SECONDS = 4.0


@dataclass(frozen=True)
class Example:
    batch: int
    kv_len: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    kv_format: KVFormat

    @property
    def q_shape(self) -> tuple[int, int, int]:
        return self.batch, self.num_qo_heads, self.head_dim

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.kv_len, self.num_kv_heads, self.head_dim

    def check(self) -> None:
        """ValueError if no such call exists."""
        q = Facts("float16", self.q_shape, (0, 0, 2), -1, "numpy")
        kv = Facts(self.kv_format.dtype.name, self.kv_shape, (0, 0, 0, self.kv_format.itemsize), -1, "numpy")
        bind_decode(q, kv, kv, batched=True)


@dataclass(frozen=True)
class Data:
    """A batch with fp16 caches, and the same caches in the example's format."""

    q: Any
    k: Any
    v: Any
    k_exact: Any
    v_exact: Any

    @classmethod
    def of(cls, example: Example) -> Data:
        rng = np.random.default_rng(0)
        fmt = example.kv_format
        exact = [np.empty(example.kv_shape, np.float16) for _ in "kv"]
        stored = [np.empty(example.kv_shape, fmt.dtype) for _ in "kv"]
        for b in range(example.batch):  # request by request, so that temporaries stay small
            for values, cache in zip(exact, stored, strict=True):
                values[b] = rng.standard_normal(example.kv_shape[1:], np.float32)
                cache[b] = reference.encode(values[b], fmt).view(fmt.dtype) if fmt.is_fp8 else values[b]
        q = rng.standard_normal(example.q_shape, np.float32).astype(np.float16)
        return cls(q, *stored, *exact)

    def truth(self, k: Any, v: Any, fmt: KVFormat) -> Any:
        out, _ = reference.attention(
            self.q, k, v, k_format=fmt, v_format=fmt, sm_scale=self.q.shape[-1] ** -0.5, compute_dtype=np.float64
        )
        return out


@dataclass(frozen=True)
class Outcome:
    device: str
    out: Any
    us: float
    how: str
    read_bytes_per_second: float | None = None  # what the device reads at most


def _on_numpy(example: Example, data: Data) -> Outcome:
    times: list[float] = []
    while not times or (len(times) < 5 and sum(times) + times[-1] < _MOST_SECONDS):
        started = time.perf_counter()
        out = batch_decode_with_padded_kv_cache(data.q, data.k, data.v, "NHD", "NONE", backend="numpy")
        times.append(time.perf_counter() - started)
    return Outcome("CPU", out, float(np.median(times)) * 1e6, f"wall time, median of {len(times)}")


def _on_cuda(example: Example, data: Data) -> Outcome:
    from .arrays import cupy_library
    from .bench.limit import ReadLimit
    from .bench.timing import sets_needed, time_calls

    cupy, library, fmt = require_cupy(), cupy_library(), example.kv_format
    set_bytes = data.k.nbytes + data.v.nbytes
    sets = sets_needed(cupy, set_bytes)
    q = library.from_numpy(data.q, 0)
    caches = [(library.from_numpy(data.k, 0), library.from_numpy(data.v, 0)) for _ in range(sets)]
    outs = [library.empty(example.q_shape, "float16", 0)[0] for _ in range(sets)]

    def call(s: int) -> None:
        k, v = caches[s]
        batch_decode_with_padded_kv_cache(q, k, v, "NHD", "NONE", kv_format=fmt.name, out=outs[s])

    timing = time_calls(cupy, call, sets, set_bytes)
    limit = ReadLimit().measure(caches)
    info = device_info(0)
    return Outcome(
        f"{info.name}, sm_{info.arch}", library.to_numpy(outs[-1]), timing.us, "median of CUDA graph replays",
        limit.bytes_per_second,
    )  # fmt: skip


def run(example: Example, backend: str | None) -> int:
    """Run and print the example; the exit code."""
    if backend == "cuda" and not has_gpu():
        raise terminal.CommandError(f"no CUDA backend here: {cupy_problem()}")
    backend = backend or ("cuda" if has_gpu() else "numpy")
    fmt = example.kv_format
    with terminal.console(stderr=True).status("values and their codes") as status:
        data = Data.of(example)
        status.update(f"attention on the {backend} backend")
        outcome = (_on_cuda if backend == "cuda" else _on_numpy)(example, data)
        status.update("the same in float64")
        error = relative_l2(outcome.out, data.truth(data.k, data.v, fmt))
        loss = relative_l2(outcome.out, data.truth(data.k_exact, data.v_exact, F16))
    right = error <= TOLERANCES["f16"]  # not so for NaN

    kv_bytes = data.k.nbytes + data.v.nbytes
    fp16_bytes = data.k_exact.nbytes + data.v_exact.nbytes
    rate = kv_bytes / outcome.us * 1e6
    table = terminal.table("batch_decode_with_padded_kv_cache", "", "", left=2)
    table.show_header = False
    table.add_row("backend", backend)
    table.add_row("device", outcome.device)
    table.add_row("q, k and v", f"{list(example.q_shape)} fp16, {list(example.kv_shape)} {fmt}")
    table.add_row("cache", f"{kv_bytes / 1e6:.1f} MB; in fp16 {fp16_bytes / 1e6:.1f} MB")
    table.add_row(
        "error against float64, same bytes",
        Text(f"{error:.2e} {'≤' if right else 'exceeds'} {TOLERANCES['f16']:g}", style="green" if right else "red"),
    )
    table.add_row("error against float64, before quantising", f"{loss:.2e}")
    table.add_row("time", f"{_duration(outcome.us)} ({outcome.how})")
    table.add_row("bandwidth", f"{rate / 1e9:.1f} GB/s of K and V")
    most = outcome.read_bytes_per_second
    share = f"{rate / most:.1%} of {most / 1e9:.0f} GB/s" if most else "-"
    table.add_row("share of the device's read bandwidth", share)
    terminal.console().print(table)
    return 0 if right else 1


def _duration(us: float) -> str:
    return f"{us:.1f} µs" if us < 1e4 else f"{us / 1e3:.0f} ms"


def example(batch: int, kv_len: int, num_qo_heads: int, num_kv_heads: int, head_dim: int, kv_format: str) -> Example:
    """The example of these sizes. ValueError if they do not go together."""
    made = Example(batch, kv_len, num_qo_heads, num_kv_heads, head_dim, KV_FORMATS[kv_format])
    made.check()
    return made
