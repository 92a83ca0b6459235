"""The way of one decode call, from the caller's arrays to the caller's result.

The first call of a kind (same types, shapes, strides, options) is checked, planned and compiled; what came of that is
kept, and later calls of the kind only read addresses and launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arrays, scales
from .arrays import HOST, Library, device_name
from .backends import reference
from .backends.cuda import PreparedDecode
from .formats import KV_FORMATS
from .jit.device import check_backend, cupy_problem, has_gpu
from .lengths import device_lens, host_lens
from .positions import check_pos_encoding_mode
from .problem import DecodeProblem, Facts, bind_decode, check_address, check_rows

_LSE_UNITS = {"2": 1.0, "e": math.log(2.0)}
MOST_FLOAT32 = 3.4028234e38
#: Kinds of calls that are remembered before all are forgotten.
_MOST_PREPARED = 4096
_prepared: dict[tuple[Any, ...], Prepared] = {}


class Prepared:
    """What the first call of a kind found out: where it runs, and on a GPU everything but addresses."""

    __slots__ = (
        "cuda", "default_scale", "device", "kernels", "lse_shape", "lse_unit", "out_dtype", "out_shape", "problem",
        "run",
    )  # fmt: skip

    def __init__(self, problem: DecodeProblem, facts: Facts, cuda: bool, lse_base: str, out_strides: Any):
        self.problem = problem
        self.device = facts.device
        self.cuda = cuda
        self.default_scale = 1.0 / math.sqrt(problem.head_dim)
        self.lse_unit = _LSE_UNITS[lse_base]
        self.out_shape = facts.shape
        self.lse_shape = facts.shape[:-1]
        self.out_dtype = facts.dtype
        if self.on_device:
            self.kernels = PreparedDecode(problem, self.device, out_strides)
            self.run = self.kernels.run

    @property
    def on_device(self) -> bool:
        """Whether the caller's arrays are where the kernels run."""
        return self.cuda and self.device != HOST


def forget() -> None:
    """Plan calls of every kind anew, because plans have been tuned."""
    _prepared.clear()


def decode(
    batched: bool,
    q: Any,
    k: Any,
    v: Any,
    kv_layout: str,
    pos_encoding_mode: str,
    q_scale: Any,
    k_scale: Any,
    v_scale: Any,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float | None,
    kv_lens: Any,
    kv_format: Any,
    return_lse: bool,
    lse_base: str,
    out: Any,
    backend: str | None,
    probe: Callable[[Prepared], Prepared] | None = None,
) -> Any:
    library = arrays.library_of(q, "q")
    if library is None or type(k) is not type(q) or type(v) is not type(q):
        q, k, v = (arrays.adopt(array, name) for array, name in ((q, "q"), (k, "k"), (v, "v")))
        library = common_library(q, k, v)
    try:
        q_address, q_signature = library.read(q)
        k_address, k_signature = library.read(k)
        v_address, v_signature = library.read(v)
    except (TypeError, ValueError):
        for name, array in (("q", q), ("k", k), ("v", v)):
            arrays.read(library, array, name)
        raise
    if out is None:
        out_address, out_signature = 0, None
    elif type(out) is type(q) and library.writes_freely:
        out_address, out_signature = arrays.read(library, out, "out")
    else:
        out_address, out_signature = read_out(library, out)
    # Values that compare equal to a checked one must not pass as it.
    if type(window_left) is not int or not -1 <= window_left < 2**31:
        window_left = integer(window_left, "window_left")
    if logits_soft_cap is not None and type(logits_soft_cap) is not float:
        logits_soft_cap = scales.number(logits_soft_cap, "logits_soft_cap")
    if isinstance(kv_format, list):
        kv_format = tuple(kv_format)

    key = (
        batched, library, q_signature, k_signature, v_signature, out_signature, kv_layout, pos_encoding_mode,
        logits_soft_cap, window_left, kv_format, lse_base, backend, kv_lens is not None,
    )  # fmt: skip
    try:
        prepared = _prepared.get(key)
    except TypeError:  # an option that cannot be hashed is not one of ours
        _prepare(*key)
        raise
    if prepared is None:
        prepared = _prepare(*key)
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared
    if probe is not None:  # tune() takes the launch from here
        prepared = probe(prepared)
    if sm_scale is None:
        sm_scale = prepared.default_scale
    elif type(sm_scale) is not float:
        sm_scale = scales.number(sm_scale, "sm_scale")
    if not prepared.cuda or prepared.device == HOST:
        return decode_from_host(
            library, prepared, q, k, v, kv_layout, q_scale, k_scale, v_scale, window_left, logits_soft_cap, sm_scale,
            kv_lens, return_lse, lse_base, out,
        )  # fmt: skip
    lens_address = 0
    if kv_lens is not None:
        kv_lens, lens_address = device_lens(kv_lens, library, prepared.problem, prepared.device)
    return decode_on_device(
        library, prepared, q, q_address, k_address, v_address, q_scale, k_scale, v_scale, window_left,
        logits_soft_cap, sm_scale, lens_address, 0, return_lse, out, out_address,
    )  # fmt: skip


def decode_on_device(
    library: Library,
    prepared: Prepared,
    q: Any,
    q_address: int,
    k_address: int,
    v_address: int,
    q_scale: Any,
    k_scale: Any,
    v_scale: Any,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float,
    lens_address: int,
    work_list: int,
    return_lse: bool,
    out: Any,
    out_address: int,
) -> Any:
    """The call on device arrays whose kind has been checked. ``work_list``: address of one that is made, or 0."""
    if (q_address | k_address | v_address | out_address) % 16:
        for name, address in (("q", q_address), ("k", k_address), ("v", v_address), ("out", out_address)):
            check_address(name, address)
    if not (q_address and k_address and v_address):
        _refuse_null(prepared.problem, q=q_address, k=k_address, v=v_address)
    device = prepared.device
    heads = prepared.problem.num_kv_heads
    q_factor = k_factor = v_factor = scales.NO_SCALE
    if q_scale is not None:
        q_factor = scales.device_scale(q_scale, "q_scale", 0, library, device)
    if k_scale is not None:
        k_factor = scales.device_scale(k_scale, "k_scale", heads, library, device)
    if v_scale is not None:
        v_factor = scales.device_scale(v_scale, "v_scale", heads, library, device)
    if out is None:
        out, out_address = library.empty_like(q, prepared.out_shape, prepared.out_dtype, device)
    lse, lse_address = library.empty(prepared.lse_shape, "float32", device) if return_lse else (None, 0)
    logit_scale = sm_scale * q_factor.known * k_factor.known
    if not (-MOST_FLOAT32 <= logit_scale <= MOST_FLOAT32 and -MOST_FLOAT32 <= v_factor.known <= MOST_FLOAT32):
        raise ValueError(
            f"sm_scale, q_scale, k_scale, v_scale: expected finite factors in float32, got {logit_scale} for the "
            f"logits and {v_factor.known} for the result"
        )
    # In the order of DecodeParams.
    prepared.run(library, (
        out_address, lse_address, prepared.lse_unit, q_address, k_address, v_address, lens_address,
        q_factor.address, k_factor.address, v_factor.address,
        logit_scale, v_factor.known, logits_soft_cap or 0.0,
        window_left, k_factor.stride, v_factor.stride,
    ), work_list)  # fmt: skip
    if return_lse:
        return library.wrap(out), library.wrap(lse)
    return library.wrap(out)


def _refuse_null(problem: DecodeProblem, **addresses: int) -> None:
    """Only an array without elements may have no memory; torch's fake tensors have none either."""
    for name, address in addresses.items():
        if not address and problem.batch and (name == "q" or problem.kv_len):
            raise ValueError(f"{name}: expected an array with memory, got one at address 0 (a fake tensor?)")


def integer(value: Any, argument: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{argument}: expected an integer, got {value!r}")
    # Beyond any length, and what 32 bits hold.
    return max(-1, min(int(value), 2**31 - 1))


def common_library(q: Any, k: Any, v: Any) -> Library:
    libraries = {name: arrays.library_of(array, name) for name, array in (("q", q), ("k", k), ("v", v))}
    library = libraries["q"]
    for name, other in libraries.items():
        if other is not library:
            raise TypeError(
                f"{name}: expected an array of {library.name if library else None} like q, "
                f"got one of {other.name if other else None}"
            )
    assert library is not None  # adopt() leaves no other
    return library


def read_out(library: Library, out: Any) -> tuple[int, Any]:
    if not library.mutable:
        raise TypeError(f"out: {library.name} arrays cannot be written; leave it out")
    if arrays.library_of(out, "out") is not library:
        raise TypeError(f"out: expected an array of {library.name} like q, got {type(out).__name__}")
    if library.name == "numpy" and not out.flags.writeable:
        raise ValueError("out: expected an array that can be written, got a read-only one")
    return arrays.read(library, out, "out")


def _prepare(
    batched: bool,
    library: Library,
    q_signature: Any,
    k_signature: Any,
    v_signature: Any,
    out_signature: Any,
    kv_layout: str,
    pos_encoding_mode: str,
    logits_soft_cap: float | None,
    window_left: int,
    kv_format: Any,
    lse_base: str,
    backend: str | None,
    ragged: bool,
) -> Prepared:
    """What the first call of a kind finds out."""
    facts = [library.facts(signature) for signature in (q_signature, k_signature, v_signature)]
    return prepare(
        facts, None if out_signature is None else library.facts(out_signature), lse_base=lse_base, batched=batched,
        kv_layout=kv_layout, pos_encoding_mode=pos_encoding_mode, logits_soft_cap=logits_soft_cap,
        window_left=window_left, kv_format=kv_format, backend=backend, ragged=ragged,
    )  # fmt: skip


def prepare(facts: list[Facts], out: Facts | None, *, lse_base: str, **options: Any) -> Prepared:
    """A kind of call checked, planned and compiled: ``facts`` of q, k and v, and ``options`` of ``check_call``."""
    if not isinstance(lse_base, str) or lse_base not in _LSE_UNITS:
        raise ValueError(f"lse_base: expected '2' or 'e', got {lse_base!r}")
    problem, cuda = check_call(*facts, **options)
    out_strides = (problem.num_qo_heads * problem.head_dim * 2, problem.head_dim * 2)
    if out is not None:
        out_strides = _check_out(out, facts[0])
    if cuda and not has_gpu():
        asked = "cuda was asked for" if options["backend"] else "the arrays need CUDA"
        raise RuntimeError(f"backend: {asked}: {cupy_problem()}")
    return Prepared(problem, facts[0], cuda, lse_base, out_strides)


def check_call(
    q: Facts,
    k: Facts,
    v: Facts,
    *,
    batched: bool,
    kv_layout: str,
    pos_encoding_mode: str,
    logits_soft_cap: float | None,
    window_left: int,
    kv_format: Any,
    backend: str | None,
    ragged: bool = False,
) -> tuple[DecodeProblem, bool]:
    """The problem that a call is, and whether it runs on CUDA. ValueError or TypeError for what does not fit."""
    check_pos_encoding_mode(pos_encoding_mode)
    check_backend(backend)
    if logits_soft_cap is not None and not (logits_soft_cap >= 0 and math.isfinite(logits_soft_cap)):
        raise ValueError(f"logits_soft_cap: expected a finite number >= 0 or None, got {logits_soft_cap}")
    problem = bind_decode(
        q, k, v, batched=batched, kv_layout=kv_layout, requested_format=kv_format, soft_cap=bool(logits_soft_cap),
        window_left=window_left, position=pos_encoding_mode, ragged=ragged,
    )  # fmt: skip
    for name, facts, itemsize in (
        ("q", q, 2),
        ("k", k, KV_FORMATS[problem.k_format].itemsize),
        ("v", v, KV_FORMATS[problem.v_format].itemsize),
    ):
        check_rows(name, facts, itemsize)
        if facts.device != q.device:
            raise ValueError(f"{name}: expected device {device_name(q.device)} like q, got {device_name(facts.device)}")
    return problem, backend == "cuda" or (backend is None and (q.device != HOST or has_gpu()))


def _check_out(out: Facts, q: Facts) -> tuple[int, int]:
    """Strides (request, head) of ``out``; it must look like ``q``."""
    for what, expected, got in (
        ("shape", list(q.shape), list(out.shape)),
        ("dtype", q.dtype, out.dtype),
        ("device", device_name(q.device), device_name(out.device)),
    ):
        if expected != got:
            raise (TypeError if what == "dtype" else ValueError)(f"out: expected {what} {expected} like q, got {got}")
    check_rows("out", out, 2)
    row = 2 * out.shape[-1]
    heads, head_stride = out.shape[-2], abs(out.strides[-2])
    batch, batch_stride = (out.shape[0], abs(out.strides[0])) if len(out.shape) == 3 else (1, 0)
    apart = (heads < 2 or head_stride >= row) and (batch < 2 or batch_stride >= row)
    nested = batch < 2 or heads < 2 or batch_stride >= heads * head_stride or head_stride >= batch * batch_stride
    if not (apart and nested):
        raise ValueError(f"out: expected rows that do not overlap, got strides {list(out.strides)} in bytes")
    return (0, out.strides[0]) if len(out.shape) == 2 else (out.strides[0], out.strides[1])


def decode_from_host(
    library: Library,
    prepared: Prepared,
    q: Any,
    k: Any,
    v: Any,
    kv_layout: str,
    q_scale: Any,
    k_scale: Any,
    v_scale: Any,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float,
    kv_lens: Any,
    return_lse: bool,
    lse_base: str,
    out: Any,
) -> Any:
    """The call on host arrays: on the GPU (uploaded, result downloaded) or in NumPy, as was decided."""
    problem, device = prepared.problem, prepared.device
    values = [library.to_numpy(array) for array in (q, k, v)]
    options = {
        "q_scale": scales.host_scale(q_scale, "q_scale", 0),
        "k_scale": scales.host_scale(k_scale, "k_scale", problem.num_kv_heads),
        "v_scale": scales.host_scale(v_scale, "v_scale", problem.num_kv_heads),
        "kv_lens": None if kv_lens is None else host_lens(kv_lens, problem.batch, problem.kv_len),
        "window_left": window_left, "logits_soft_cap": logits_soft_cap, "sm_scale": sm_scale, "lse_base": lse_base,
    }  # fmt: skip
    run = _run_uploaded if prepared.cuda else _run_numpy
    result, lse = run(problem, values, kv_layout, options)
    result, lse = result.reshape(prepared.out_shape), lse.reshape(prepared.lse_shape)
    if out is None:
        out = library.from_numpy(result, device)
    else:
        out[...] = library.from_numpy(result, device)
    return (out, library.from_numpy(lse, device)) if return_lse else out


def _run_numpy(
    problem: DecodeProblem, values: list[np.ndarray], kv_layout: str, options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    q, k, v = values
    if k.ndim == 3:
        q, k, v = q[None], k[None], v[None]
    if kv_layout == "HND":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    result, lse = reference.attention(
        q, k, v, k_format=KV_FORMATS[problem.k_format], v_format=KV_FORMATS[problem.v_format], **options
    )
    with np.errstate(over="ignore"):
        return result.astype(q.dtype), lse


def _run_uploaded(
    problem: DecodeProblem, values: list[np.ndarray], kv_layout: str, options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    library = arrays.cupy_library()
    q, k, v = (library.from_numpy(array, 0) for array in values)
    out, lse = decode(
        q.ndim == 3, q, k, v, kv_layout, problem.position, kv_format=(problem.k_format, problem.v_format),
        return_lse=True, out=None, backend="cuda", **options,
    )  # fmt: skip
    return library.to_numpy(out), library.to_numpy(lse)
