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
from .options import LSE_UNITS, as_key, check_lse_base
from .outputs import check_out, read_out
from .positions import check_pos_encoding_mode
from .problem import DecodeProblem, Facts, bind_decode, check_address, check_rows

#: Of a padded cache whose requests are all of full length.
NO_TABLES = (0, 0, 0, 0, 0)
#: Kinds of calls that are remembered before all are forgotten.
_MOST_PREPARED = 4096
_prepared: dict[tuple[Any, ...], Prepared] = {}


class Prepared:
    """What the first call of a kind found out: where it runs, and on a GPU everything but addresses."""

    __slots__ = (
        "cuda", "default_rest", "default_scale", "device", "kernels", "lse_shape", "lse_unit", "on_device", "out_dtype",
        "out_shape", "problem", "run", "v_offset", "workspace",
    )  # fmt: skip

    def __init__(
        self, problem: DecodeProblem, facts: Facts, cuda: bool, lse_base: str, out_strides: Any, v_offset: int = 0
    ):
        self.problem = problem
        self.v_offset = v_offset
        self.workspace = 0
        self.device = facts.device
        self.cuda = cuda
        self.default_scale = 1.0 / math.sqrt(problem.head_dim)
        #: What ``PreparedDecode.run`` takes as ``rest`` in a call without tables and scales, once there was one.
        self.default_rest: tuple[int | float, ...] | None = None
        self.lse_unit = LSE_UNITS[lse_base]
        self.out_shape = facts.shape
        self.lse_shape = facts.shape[:-1]
        self.out_dtype = facts.dtype
        #: Whether the caller's arrays are where the kernels run.
        self.on_device = cuda and self.device != HOST
        if self.on_device:
            self.kernels = PreparedDecode(problem, self.device, out_strides)
            self.run = self.kernels.run
            self.workspace = self.kernels.plan.workspace


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
    kind = type(q)
    if library is None or type(k) is not kind or type(v) is not kind:
        q, k, v = (arrays.adopt(array, name) for array, name in ((q, "q"), (k, "k"), (v, "v")))
        library = common_library(q, k, v)
    try:
        q_address, k_address, v_address, signature = library.read_inputs(q, k, v)
        if out is None:
            out_address, out_signature = 0, None
        elif type(out) is type(q) and library.always_writable:
            out_address, out_signature = library.read(out)
        else:
            out_address, out_signature = read_out(library, out)
    except (TypeError, ValueError):
        for name, array in (("q", q), ("k", k), ("v", v)):
            arrays.read(library, array, name)
        if out is not None:
            read_out(library, out)
        raise
    if type(window_left) is not int or window_left != -1 or logits_soft_cap is not None or kv_format is not None:
        window_left, logits_soft_cap, kv_format = as_key(window_left, logits_soft_cap, kv_format)
    key = (
        batched, library, signature, out_signature, kv_layout, pos_encoding_mode, logits_soft_cap, window_left,
        kv_format, lse_base, backend, kv_lens is not None,
    )  # fmt: skip
    try:
        prepared = _prepared[key]
    except (KeyError, TypeError):
        prepared = None
    if prepared is None:
        prepared = prepared_for(key, _prepare)
    if probe is not None:  # tune() takes the launch from here
        prepared = probe(prepared)
    if sm_scale is None:
        sm_scale = prepared.default_scale
    elif type(sm_scale) is not float:
        sm_scale = scales.number(sm_scale, "sm_scale")
    if not prepared.on_device:
        return decode_from_host(
            library, prepared, q, k, v, kv_layout, q_scale, k_scale, v_scale, window_left, logits_soft_cap, sm_scale,
            kv_lens, return_lse, lse_base, out,
        )  # fmt: skip
    tables = NO_TABLES
    if kv_lens is not None:
        kv_lens, lens_address = device_lens(kv_lens, library, prepared.problem, prepared.device)
        tables = (lens_address, 0, 0, 0, 0)
    return run_on_device(
        library, prepared, q, (q_address, k_address, v_address, out_address), tables, q_scale, k_scale, v_scale,
        window_left, logits_soft_cap, sm_scale, return_lse, out,
    )  # fmt: skip


def prepared_for(key: tuple[Any, ...], prepare: Callable[..., Prepared]) -> Prepared:
    """What the first call of this kind found out; this one finds it out with ``prepare`` if it is the first."""
    try:
        prepared = _prepared.get(key)
    except TypeError:  # an option that cannot be hashed is not one of ours
        prepare(*key)
        raise
    if prepared is None:
        prepared = prepare(*key)
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared
    return prepared


def run_on_device(
    library: Library,
    prepared: Prepared,
    q: Any,
    addresses: tuple[int, int, int, int],
    tables: tuple[int, int, int, int, int],
    q_scale: Any,
    k_scale: Any,
    v_scale: Any,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float,
    return_lse: bool,
    out: Any,
    work_list: int = 0,
    workspace: tuple[Any, int] | None = None,
) -> Any:
    """Launch: ``addresses`` of q, k, v and out, ``tables`` as in DecodeParams, ``work_list`` of one that is made, or 0.

    Returns the caller's result.
    """
    q_address, k_address, v_address, out_address = addresses
    if (q_address | k_address | v_address | out_address) % 16:
        for name, address in (("q", q_address), ("k", k_address), ("v", v_address), ("out", out_address)):
            check_address(name, address)
    if not (q_address and k_address and v_address):
        _refuse_null(prepared.problem, q=q_address, k=k_address, v=v_address)
    device = prepared.device
    rest = prepared.default_rest
    usual = q_scale is k_scale is v_scale is None and tables is NO_TABLES and sm_scale == prepared.default_scale
    if rest is None or not usual:
        q_factor, k_factor, v_factor, logit_scale = scales.call_scales(
            q_scale, k_scale, v_scale, sm_scale, prepared.problem.num_kv_heads, library, device
        )
        rest = (
            *tables, q_factor.address, k_factor.address, v_factor.address, logit_scale, v_factor.known,
            logits_soft_cap or 0.0, window_left, k_factor.stride, v_factor.stride,
        )  # fmt: skip
        if usual:  # window and soft cap are those of every call of the kind
            prepared.default_rest = rest
    if out is None:
        out, out_address = library.empty_like(q, prepared.out_shape, prepared.out_dtype, device)
    lse, lse_address = library.empty(prepared.lse_shape, "float32", device) if return_lse else (None, 0)
    prepared.run(
        library, out_address, lse_address, prepared.lse_unit, q_address, k_address, v_address, rest, work_list,
        workspace,
    )  # fmt: skip
    if return_lse:
        return library.wrap(out), library.wrap(lse)
    return library.wrap(out)


def _refuse_null(problem: DecodeProblem, **addresses: int) -> None:
    """Only an array without elements may have no memory; torch's fake tensors have none either."""
    for name, address in addresses.items():
        if not address and problem.batch and (name == "q" or problem.kv_len):
            raise ValueError(f"{name}: expected an array with memory, got one at address 0 (a fake tensor?)")


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


def _prepare(
    batched: bool,
    library: Library,
    signature: Any,
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
    out = None if out_signature is None else library.facts(out_signature)
    return prepare(
        library.input_facts(signature), out, lse_base=lse_base, batched=batched, kv_layout=kv_layout,
        pos_encoding_mode=pos_encoding_mode, logits_soft_cap=logits_soft_cap, window_left=window_left,
        kv_format=kv_format, backend=backend, ragged=ragged,
    )  # fmt: skip


def prepare(facts: list[Facts], out: Facts | None, *, lse_base: str, **options: Any) -> Prepared:
    """A kind of call checked, planned and compiled: ``facts`` of q, k and v, and ``options`` of ``check_call``."""
    check_lse_base(lse_base)
    problem, cuda = check_call(*facts, **options)
    return prepare_problem(problem, facts[0], cuda, lse_base, out, options["backend"])


def prepare_problem(
    problem: DecodeProblem,
    q: Facts,
    cuda: bool,
    lse_base: str,
    out: Facts | None,
    backend: str | None,
    v_offset: int = 0,
) -> Prepared:
    """Plan, compile and pack a checked call. ``v_offset``: bytes from where K is said to be to V, if they are one."""
    out_strides = (problem.num_qo_heads * problem.head_dim * 2, problem.head_dim * 2)
    if out is not None:
        out_strides = check_out(out, q)
    if cuda and not has_gpu():
        raise RuntimeError(f"backend: {'cuda was asked for' if backend else 'the arrays need CUDA'}: {cupy_problem()}")
    return Prepared(problem, q, cuda, lse_base, out_strides, v_offset)


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
    check_options(pos_encoding_mode, logits_soft_cap, backend)
    problem = bind_decode(
        q, k, v, batched=batched, kv_layout=kv_layout, requested_format=kv_format, soft_cap=bool(logits_soft_cap),
        window_left=window_left, position=pos_encoding_mode, ragged=ragged,
    )  # fmt: skip
    return problem, runs_on_cuda(problem, q, k, v, backend)


def check_options(pos_encoding_mode: str, logits_soft_cap: float | None, backend: str | None) -> None:
    """ValueError, or NotImplementedError, for a mode, a soft cap or a backend that there is not."""
    check_pos_encoding_mode(pos_encoding_mode)
    check_backend(backend)
    if logits_soft_cap is not None and not (logits_soft_cap >= 0 and math.isfinite(logits_soft_cap)):
        raise ValueError(f"logits_soft_cap: expected a finite number >= 0 or None, got {logits_soft_cap}")


def runs_on_cuda(
    problem: DecodeProblem, q: Facts, k: Facts, v: Facts, backend: str | None, names: tuple[str, str] = ("k", "v")
) -> bool:
    """Where the call runs. ValueError for rows that kernels cannot load, and for different devices."""
    for name, facts, itemsize in (
        ("q", q, 2),
        (names[0], k, KV_FORMATS[problem.k_format].itemsize),
        (names[1], v, KV_FORMATS[problem.v_format].itemsize),
    ):
        check_rows(name, facts, itemsize)
        if facts.device != q.device:
            raise ValueError(f"{name}: expected device {device_name(q.device)} like q, got {device_name(facts.device)}")
    return backend == "cuda" or (backend is None and (q.device != HOST or has_gpu()))


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
    problem = prepared.problem
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
    return to_caller(library, prepared, result, lse, return_lse, out)


def to_caller(
    library: Library, prepared: Prepared, result: np.ndarray, lse: np.ndarray, return_lse: bool, out: Any
) -> Any:
    """Results on the host as the caller's arrays."""
    device = prepared.device
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
