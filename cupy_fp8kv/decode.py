"""Decode attention over padded caches: the public operations, and the way of one call.

The first call of a kind (same types, shapes, strides, options) is checked, planned and compiled; what came of that is
kept, and later calls of the kind only read addresses and launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import arrays, scales
from .arrays import HOST, Library
from .backends import reference
from .formats import KV_FORMATS, Q_DTYPES
from .jit.device import cupy_problem, device_info, has_gpu, require_cupy
from .plan import DeviceInfo, Plan, plan_decode
from .positions import check_pos_encoding_mode
from .problem import DecodeProblem, Facts, bind_decode, check_address, check_rows

_LSE_UNITS = {"2": 1.0, "e": math.log(2.0)}
#: Kinds of calls that are remembered before all are forgotten.
_MOST_PREPARED = 4096
_prepared: dict[tuple[Any, ...], _Prepared] = {}


def single_decode_with_kv_cache(
    q: Any,
    k: Any,
    v: Any,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    *,
    kv_format: Any = None,
    return_lse: bool = False,
    lse_base: str = "2",
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Attention of one query token over one request's KV cache.

    Parameters
    ----------
    q : array ``[num_qo_heads, head_dim]``, float16 or bfloat16.
    k, v : arrays ``[kv_len, num_kv_heads, head_dim]`` for ``kv_layout="NHD"``, ``[num_kv_heads, kv_len, head_dim]`` for
        ``"HND"``.
    use_tensor_cores : accepted for FlashInfer's sake; the kernel always uses tensor cores.

    Everything else is as in :func:`batch_decode_with_padded_kv_cache`.

    Returns
    -------
    out : ``[num_qo_heads, head_dim]``, q's dtype and library; with ``return_lse`` a pair with lse ``[num_qo_heads]``.
    """
    return _decode(
        False, q, k, v, kv_layout, pos_encoding_mode, q_scale, k_scale, v_scale, window_left, logits_soft_cap, sm_scale,
        None, kv_format, return_lse, lse_base, out, backend,
    )  # fmt: skip


def batch_decode_with_padded_kv_cache(
    q: Any,
    k_padded: Any,
    v_padded: Any,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    *,
    kv_lens: Any = None,
    kv_format: Any = None,
    window_left: int = -1,
    return_lse: bool = False,
    lse_base: str = "2",
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Attention of one query token per request over padded KV caches, ``softmax(q kᵀ · sm_scale) v``.

    Query head ``h`` reads cache head ``h // (num_qo_heads / num_kv_heads)`` (Ainslie et al., "GQA", 2023).

    Parameters
    ----------
    q : array ``[batch, num_qo_heads, head_dim]``, float16 or bfloat16, of NumPy, CuPy, torch, JAX or with DLPack.
    k_padded, v_padded : arrays of the same library and device, ``[batch, kv_len, num_kv_heads, head_dim]`` for
        ``kv_layout="NHD"``, ``[batch, num_kv_heads, kv_len, head_dim]`` for ``"HND"``. FP8 as the library's own type
        or as uint8 codes, float16 or bfloat16; K and V may differ. Any strides with a contiguous last axis and rows at
        multiples of 16 bytes. ``head_dim`` is a multiple of 16 up to 256.
    pos_encoding_mode : ``"NONE"``; the others raise NotImplementedError. ``rope_scale``, ``rope_theta`` are theirs.
    q_scale, k_scale, v_scale : numbers, or float arrays with one element; ``k_scale`` and ``v_scale`` also
        ``[num_kv_heads]``. Arrays on the device are read by the kernel, never by the host. The logits are multiplied
        with ``q_scale * k_scale``, the result with ``v_scale``, both in float32.
    logits_soft_cap : logits become ``cap * tanh(logits / cap)`` (Gemma 2); None or 0: they stay.
    sm_scale : the softmax scale, default ``1 / sqrt(head_dim)``.
    kv_lens : int32 ``[batch]``: request b has rows ``[0, kv_lens[b])``; what lies beyond is never read. On the host it
        is checked; on the device it is used as it is, cut to ``[0, kv_len]``, and never copied to the host.
    kv_format : what uint8 codes mean, ``"e4m3"`` (default) or ``"e5m2"``, or a pair (K, V).
    window_left : a query at row n - 1 sees rows ``>= n - 1 - window_left``; negative: all.
    return_lse : also return the log-sum-exp of the logits, float32 ``[batch, num_qo_heads]``.
    lse_base : ``"2"`` or ``"e"``.
    out : array for the result, ``[batch, num_qo_heads, head_dim]``, q's dtype, library and device.
    backend : ``"cuda"`` or ``"numpy"`` to force one. By default device arrays run where they are, and host arrays on
        the GPU if there is one (uploaded, result downloaded), otherwise in NumPy.

    Returns
    -------
    out : ``[batch, num_qo_heads, head_dim]``, q's dtype, in the caller's library on the caller's device, written on
        the caller's current stream. A request without rows gives 0 (and -inf for lse).

    Raises
    ------
    ValueError, TypeError
        Arrays that do not fit together; the message names the argument, what was expected and what came.
    RuntimeError
        ``backend="cuda"`` without a usable GPU, or a kernel that does not compile.
    """
    return _decode(
        True, q, k_padded, v_padded, kv_layout, pos_encoding_mode, q_scale, k_scale, v_scale, window_left,
        logits_soft_cap, sm_scale, kv_lens, kv_format, return_lse, lse_base, out, backend,
    )  # fmt: skip


def batch_decode_with_padded_kv_cache_return_lse(
    q: Any,
    k_padded: Any,
    v_padded: Any,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    *,
    kv_lens: Any = None,
    kv_format: Any = None,
    window_left: int = -1,
    lse_base: str = "2",
    out: Any = None,
    backend: str | None = None,
) -> tuple[Any, Any]:
    """:func:`batch_decode_with_padded_kv_cache` that returns ``(out, lse)``."""
    return _decode(
        True, q, k_padded, v_padded, kv_layout, pos_encoding_mode, q_scale, k_scale, v_scale, window_left,
        logits_soft_cap, sm_scale, kv_lens, kv_format, True, lse_base, out, backend,
    )  # fmt: skip


class _Prepared:
    """What the first call of a kind found out: where it runs, and on a GPU everything but addresses."""

    __slots__ = ("cuda", "default_scale", "device", "lse_shape", "lse_unit", "out_dtype", "out_shape", "problem", "run")

    def __init__(self, problem: DecodeProblem, facts: Facts, cuda: bool, lse_base: str, out_strides: Any):
        self.problem = problem
        self.device = facts.device
        self.cuda = cuda
        self.default_scale = 1.0 / math.sqrt(problem.head_dim)
        self.lse_unit = _LSE_UNITS[lse_base]
        self.out_shape = facts.shape
        self.lse_shape = facts.shape[:-1]
        self.out_dtype = facts.dtype
        if cuda and self.device != HOST:
            from .backends.cuda import PreparedDecode

            self.run = PreparedDecode(problem, self.device, out_strides).run


def _decode(
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
) -> Any:
    library = arrays.library_of(q, "q")
    if library is None or type(k) is not type(q) or type(v) is not type(q):
        q, k, v = (arrays.adopt(array, name) for array, name in ((q, "q"), (k, "k"), (v, "v")))
        library = _common_library(q, k, v)
    q_address, q_signature = library.read(q)
    k_address, k_signature = library.read(k)
    v_address, v_signature = library.read(v)
    out_address, out_signature = _read_out(library, out) if out is not None else (0, None)
    if isinstance(kv_format, list):
        kv_format = tuple(kv_format)

    key = (
        batched, library, q_signature, k_signature, v_signature, out_signature, kv_layout, pos_encoding_mode,
        logits_soft_cap, window_left, kv_format, lse_base, backend,
    )  # fmt: skip
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = _prepare(*key)
        # Alignment is the address's; strides are checked with it, once a kind, and addresses below.
        for name, address, facts, itemsize in (
            ("q", q_address, library.facts(q_signature), 2),
            ("k", k_address, library.facts(k_signature), KV_FORMATS[prepared.problem.k_format].itemsize),
            ("v", v_address, library.facts(v_signature), KV_FORMATS[prepared.problem.v_format].itemsize),
        ):
            check_rows(name, facts, itemsize, address)
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared
    scale = prepared.default_scale if sm_scale is None else sm_scale
    if not prepared.cuda or prepared.device == HOST:
        return _decode_from_host(
            library, prepared, q, k, v, kv_layout, q_scale, k_scale, v_scale, window_left, logits_soft_cap, scale,
            kv_lens, return_lse, lse_base, out,
        )  # fmt: skip

    if (q_address | k_address | v_address | out_address) % 16:
        for name, address in (("q", q_address), ("k", k_address), ("v", v_address), ("out", out_address)):
            check_address(name, address)
    device = prepared.device
    heads = prepared.problem.num_kv_heads
    q_factor = k_factor = v_factor = scales.NO_SCALE
    if q_scale is not None:
        q_factor = scales.device_scale(q_scale, "q_scale", 0, library, device)
    if k_scale is not None:
        k_factor = scales.device_scale(k_scale, "k_scale", heads, library, device)
    if v_scale is not None:
        v_factor = scales.device_scale(v_scale, "v_scale", heads, library, device)
    lens_address = 0
    if kv_lens is not None:
        kv_lens, lens_address = _device_lens(kv_lens, library, prepared.problem, device)
    if out is None:
        out, out_address = library.empty(prepared.out_shape, prepared.out_dtype, device)
    lse, lse_address = library.empty(prepared.lse_shape, "float32", device) if return_lse else (None, 0)
    prepared.run(
        library, q_address, k_address, v_address, out_address, lse_address, lens_address,
        q_factor.address, k_factor.address, v_factor.address, k_factor.stride, v_factor.stride,
        scale * q_factor.known * k_factor.known, v_factor.known, logits_soft_cap or 0.0, prepared.lse_unit, window_left,
    )  # fmt: skip
    if return_lse:
        return library.wrap(out), library.wrap(lse)
    return library.wrap(out)


def _common_library(q: Any, k: Any, v: Any) -> Library:
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


def _read_out(library: Library, out: Any) -> tuple[int, Any]:
    if not library.mutable:
        raise TypeError(f"out: {library.name} arrays cannot be written; leave it out")
    if arrays.library_of(out, "out") is not library:
        raise TypeError(f"out: expected an array of {library.name} like q, got {type(out).__name__}")
    return library.read(out)


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
) -> _Prepared:
    """Check a kind of call and decide where it runs."""
    check_pos_encoding_mode(pos_encoding_mode)
    if lse_base not in _LSE_UNITS:
        raise ValueError(f"lse_base: expected '2' or 'e', got {lse_base!r}")
    if backend not in (None, "cuda", "numpy"):
        raise ValueError(f"backend: expected 'cuda', 'numpy' or None, got {backend!r}")
    if logits_soft_cap is not None and not (logits_soft_cap >= 0 and math.isfinite(logits_soft_cap)):
        raise ValueError(f"logits_soft_cap: expected a finite number >= 0 or None, got {logits_soft_cap}")
    if isinstance(window_left, bool) or not isinstance(window_left, (int, np.integer)):
        raise TypeError(f"window_left: expected an integer, got {window_left!r}")
    facts = {
        name: library.facts(signature)
        for name, signature in (("q", q_signature), ("k", k_signature), ("v", v_signature))
    }
    problem = bind_decode(
        *facts.values(), batched=batched, kv_layout=kv_layout, requested_format=kv_format,
        soft_cap=bool(logits_soft_cap), window_left=int(window_left), position=pos_encoding_mode,
    )  # fmt: skip
    q = facts["q"]
    for name, other in facts.items():
        if other.device != q.device:
            raise ValueError(f"{name}: expected device {_device(q.device)} like q, got {_device(other.device)}")
    out_strides = (problem.num_qo_heads * problem.head_dim * 2, problem.head_dim * 2)
    if out_signature is not None:
        out_strides = _check_out(library.facts(out_signature), q)
    cuda = backend == "cuda" or (backend is None and (q.device != HOST or has_gpu()))
    if cuda and not has_gpu():
        raise RuntimeError(f"backend: {'cuda was asked for' if backend else 'the arrays need CUDA'}: {cupy_problem()}")
    return _Prepared(problem, q, cuda, lse_base, out_strides)


def _device(index: int) -> str:
    return "host" if index == HOST else f"cuda:{index}"


def _check_out(out: Facts, q: Facts) -> tuple[int, int]:
    """Strides (request, head) of ``out``; it must look like ``q``."""
    for what, expected, got in (
        ("shape", list(q.shape), list(out.shape)),
        ("dtype", q.dtype, out.dtype),
        ("device", _device(q.device), _device(out.device)),
    ):
        if expected != got:
            raise (TypeError if what == "dtype" else ValueError)(f"out: expected {what} {expected} like q, got {got}")
    check_rows("out", out, 2, 0)
    return (0, out.strides[0]) if len(out.shape) == 2 else (out.strides[0], out.strides[1])


def host_lens(kv_lens: Any, batch: int, kv_len: int) -> np.ndarray:
    """Lengths that the host can see, checked: integers, ``[batch]``, each in ``[0, kv_len]``; as int32."""
    lens = np.asarray(kv_lens)
    if lens.dtype.kind not in "iu":
        raise TypeError(f"kv_lens: expected int32, got {lens.dtype}")
    if lens.shape != (batch,):
        raise ValueError(f"kv_lens: expected shape [{batch}], got {list(lens.shape)}")
    if batch and (lens.min() < 0 or lens.max() > kv_len):
        wrong = int(np.flatnonzero((lens < 0) | (lens > kv_len))[0])
        raise ValueError(f"kv_lens: expected lengths from 0 to {kv_len}, got {lens[wrong]} for request {wrong}")
    return lens.astype(np.int32)


def _device_lens(kv_lens: Any, library: Library, problem: DecodeProblem, device: int) -> tuple[Any, int]:
    """Lengths where the kernel reads them: something to hold, and the address."""
    if isinstance(kv_lens, (list, tuple)):
        kv_lens = np.asarray(kv_lens)
    source = arrays.library_of(kv_lens, "kv_lens")
    if source is None:
        raise TypeError(f"kv_lens: expected an array of {library.name} or NumPy, got {type(kv_lens).__name__}")
    address, signature = source.read(kv_lens)
    facts = source.facts(signature)
    if facts.device == HOST:
        lens = host_lens(source.to_numpy(kv_lens), problem.batch, problem.kv_len)
        _refuse_capture(library.stream(device), "kv_lens")
        uploaded = arrays.upload(library, lens, device)
        return uploaded, library.read(uploaded)[0]
    if source is not library:
        raise TypeError(f"kv_lens: expected an array of {library.name} like q, got one of {source.name}")
    if facts.device != device:
        raise ValueError(f"kv_lens: expected device {_device(device)} like q, got {_device(facts.device)}")
    if facts.dtype != "int32":
        raise TypeError(f"kv_lens: expected int32, got {facts.dtype}")
    if facts.shape != (problem.batch,) or (problem.batch > 1 and facts.strides != (4,)):
        raise ValueError(
            f"kv_lens: expected a contiguous array [{problem.batch}], got shape {list(facts.shape)} with strides "
            f"{list(facts.strides)} in bytes"
        )
    return kv_lens, address


def _refuse_capture(stream: int, argument: str) -> None:
    if require_cupy().cuda.runtime.streamIsCapturing(stream):
        raise RuntimeError(f"{argument}: an array on the host cannot be captured into a graph; pass a device array")


def _decode_from_host(
    library: Library,
    prepared: _Prepared,
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
    q_factor = scales.host_scale(q_scale, "q_scale", 0)
    k_factor = scales.host_scale(k_scale, "k_scale", problem.num_kv_heads)
    v_factor = scales.host_scale(v_scale, "v_scale", problem.num_kv_heads)
    lens = None
    if kv_lens is not None:
        source = None if isinstance(kv_lens, (list, tuple)) else arrays.library_of(kv_lens, "kv_lens")
        lens = host_lens(source.to_numpy(kv_lens) if source else kv_lens, problem.batch, problem.kv_len)
    if prepared.cuda:
        result, lse = _run_uploaded(
            len(prepared.out_shape) == 3, problem, values, kv_layout, q_factor, k_factor, v_factor, window_left,
            logits_soft_cap, sm_scale, lens, lse_base,
        )  # fmt: skip
    else:
        result, lse = _run_numpy(
            problem, values, kv_layout, q_factor, k_factor, v_factor, window_left, logits_soft_cap, sm_scale, lens,
            lse_base,
        )  # fmt: skip
    result, lse = result.reshape(prepared.out_shape), lse.reshape(prepared.lse_shape)
    if out is None:
        out = library.from_numpy(result, device)
    else:
        out[...] = library.from_numpy(result, device)
    return (out, library.from_numpy(lse, device)) if return_lse else out


def _run_numpy(
    problem: DecodeProblem,
    values: list[np.ndarray],
    kv_layout: str,
    q_scale: Any,
    k_scale: Any,
    v_scale: Any,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float,
    lens: np.ndarray | None,
    lse_base: str,
) -> tuple[np.ndarray, np.ndarray]:
    q, k, v = values
    if k.ndim == 3:
        q, k, v = q[None], k[None], v[None]
    if kv_layout == "HND":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    result, lse = reference.attention(
        q, k, v, k_format=KV_FORMATS[problem.k_format], v_format=KV_FORMATS[problem.v_format], sm_scale=sm_scale,
        q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, logits_soft_cap=logits_soft_cap or 0.0,
        window_left=window_left, kv_lens=lens, lse_base=lse_base,
    )  # fmt: skip
    with np.errstate(over="ignore"):
        return result.astype(q.dtype), lse


def _run_uploaded(
    batched: bool,
    problem: DecodeProblem,
    values: list[np.ndarray],
    kv_layout: str,
    q_scale: Any,
    k_scale: Any,
    v_scale: Any,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float,
    lens: np.ndarray | None,
    lse_base: str,
) -> tuple[np.ndarray, np.ndarray]:
    library = arrays.cupy_library()
    q, k, v = (library.from_numpy(array, 0) for array in values)
    out, lse = _decode(
        batched, q, k, v, kv_layout, problem.position, q_scale, k_scale, v_scale, window_left, logits_soft_cap,
        sm_scale, lens, (problem.k_format, problem.v_format), True, lse_base, None, "cuda",
    )  # fmt: skip
    return library.to_numpy(out), library.to_numpy(lse)


@dataclass(frozen=True)
class Explanation:
    """How a call would run. ``plan`` is None on the NumPy backend."""

    backend: str
    problem: DecodeProblem
    device: DeviceInfo | None
    plan: Plan | None

    def __str__(self) -> str:
        lines = [f"problem  {self.problem}", f"backend  {self.backend}"]
        if self.plan and self.device:
            plan = self.plan
            lines += [
                f"device   {self.device.name}, sm_{self.device.arch}, {self.device.sm_count} SMs",
                f"kernel   {plan.spec}",
                f"tile     {plan.spec.tile_rows} rows x {8 * plan.spec.column_tiles} query heads a warp, "
                f"{plan.spec.warps} warps a CTA, {plan.spec.ctas_per_sm} CTAs an SM, "
                f"{plan.spec.shared_bytes} bytes of shared memory",
                f"splits   {plan.splits} (grid {plan.grid}, workspace {plan.workspace} bytes"
                f"{', then merge' if plan.splits > 1 else ''})",
                f"because  {plan.reason}",
            ]
        return "\n".join(lines)


def explain(
    q: Any,
    k: Any,
    v: Any,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    *,
    logits_soft_cap: float | None = None,
    kv_format: Any = None,
    window_left: int = -1,
    backend: str | None = None,
    device: DeviceInfo | None = None,
) -> Explanation:
    """Which kernel, tile and splits a decode call with these arrays would use, and why. Nothing is run.

    Parameters are those of :func:`batch_decode_with_padded_kv_cache`, or of :func:`single_decode_with_kv_cache` if q
    has two axes. ``device`` asks for a device that is not there.
    """
    q, k, v = (arrays.adopt(array, name) for array, name in ((q, "q"), (k, "k"), (v, "v")))
    library = _common_library(q, k, v)
    facts = [library.facts(library.read(array)[1]) for array in (q, k, v)]
    problem = bind_decode(
        *facts, batched=len(facts[0].shape) == 3, kv_layout=kv_layout, requested_format=kv_format,
        soft_cap=bool(logits_soft_cap), window_left=window_left, position=check_pos_encoding_mode(pos_encoding_mode),
    )  # fmt: skip
    index = facts[0].device
    if device is None and backend != "numpy" and (index != HOST or has_gpu()):
        device = device_info(max(index, 0))
    if device is None:
        return Explanation("numpy", problem, None, None)
    return Explanation("cuda", problem, device, plan_decode(problem, device))


def warmup(
    *,
    head_dim: int = 128,
    group_size: int = 1,
    q_dtype: Any = "float16",
    kv_format: Any = "e4m3",
    logits_soft_cap: bool = False,
    device: int = 0,
) -> list[str]:
    """Compile every kernel that decode calls of this kind may choose, so that no later call has to.

    Parameters
    ----------
    group_size : ``num_qo_heads / num_kv_heads``.
    kv_format : a format, or a pair (K, V).
    logits_soft_cap : whether calls will have a soft cap.
    device : CUDA device index.

    Returns
    -------
    What was compiled (or found in the cache), as text.
    """
    from .formats import dtype_name
    from .formats import kv_format as format_of
    from .jit import compiler
    from .jit.spec import MergeSpec, Spec
    from .plan import specs

    name = dtype_name(q_dtype)
    if name not in Q_DTYPES:
        raise TypeError(f"q_dtype: expected {' or '.join(Q_DTYPES)}, got {name}")
    pair = kv_format if isinstance(kv_format, (tuple, list)) else (kv_format, kv_format)
    k_format, v_format = (format_of(one).name for one in pair)
    q_format = "f16" if name == "float16" else "bf16"
    problem = DecodeProblem(
        1, 1, group_size, 1, head_dim, q_format, k_format, v_format, (0, 0), (0, 0, 0), (0, 0, 0),
        soft_cap=logits_soft_cap,
    )  # fmt: skip
    wanted: list[Spec] = [*specs(problem), MergeSpec(q_format)]
    return [str(compiler.load(spec, device).spec) for spec in wanted]
