"""Quantising caches and back, on both backends to the same bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import arrays
from .arrays import HOST, Library
from .backends import reference
from .backends.cuda import Quantizer, RowAxes
from .formats import FP8_FORMATS, Q_DTYPES, KVFormat, float_dtype, format_of_dtype
from .formats import kv_format as format_called
from .jit.device import check_backend, cupy_problem, has_gpu, refuse_capture
from .layouts import token_head_axes
from .problem import Facts, check_address, check_rows
from .scales import is_number, number, scale_library

#: What a computed scale may be common to.
GRANULARITIES = ("tensor", "head", "token")
_VALUE_DTYPES = (*Q_DTYPES, "float32")
_CODE_DTYPES = ("uint8", "float8_e4m3fn", "float8_e5m2")


def quantize(
    x: Any,
    kv_format: Any = "e4m3",
    scale: Any = None,
    *,
    granularity: str = "tensor",
    kv_layout: str = "NHD",
    backend: str | None = None,
) -> tuple[Any, Any]:
    """Keys or values to FP8 codes: ``codes = encode(x / scale)``.

    Rounds to nearest even; what exceeds the format, infinities included, becomes its largest finite value; NaN stays
    NaN (code 0x7F). (OCP 8-bit floating point specification, with saturation everywhere.)

    Parameters
    ----------
    x : array ``[..., D]`` with at most four axes, float16, bfloat16 or float32; D a multiple of 16. Where heads matter
        it is ``[(batch,) L, H, D]`` for ``kv_layout="NHD"`` and ``[(batch,) H, L, D]`` for ``"HND"``.
    kv_format : ``"e4m3"`` or ``"e5m2"``, or a dtype.
    scale : a number, or a float array of one element, ``[H]`` or ``x.shape[:-1]`` (one per token and head). None
        computes amax / (largest value of the format), over finite elements; 1 where that is not a normal float.
    granularity : what a computed scale is common to: ``"tensor"``, ``"head"`` or ``"token"`` (one per token and head).
    backend : None quantises where x is; ``"cuda"`` or ``"numpy"`` forces one. The codes are the same, bit for bit.

    Returns
    -------
    codes : like x, of the library's own FP8 type where it has one (torch, JAX, NumPy through ml_dtypes), uint8 in CuPy.
    scale : the one given, or the computed one: float32 ``[1]``, ``[H]`` or ``x.shape[:-1]``, like x.

    Raises
    ------
    ValueError, TypeError
        For shapes, types, layouts and scales that do not fit, naming the argument.
    """
    fmt = format_called(kv_format)
    if not fmt.is_fp8:
        raise ValueError(f"kv_format: expected one of {', '.join(FP8_FORMATS)}, got {fmt.name}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    call = _Call.of(x, "x", _VALUE_DTYPES, kv_layout, backend)
    shape = call.computed_shape(granularity) if scale is None else call.shape_of(scale)
    if not call.cuda:
        values = call.library.to_numpy(call.array)
        known: Any = call.host_scale(scale, shape)
        if scale is None:
            known = reference.amax_scale(values, fmt, granularity, call.head_axis)
            scale = call.library.from_numpy(known, call.device)
        return call.codes_from_numpy(reference.quantize(values, fmt, known, head_axis=call.head_axis), fmt), scale
    if call.device == HOST:
        gpu, moved = call.uploaded()
        given = None if scale is None else call.host_scale(scale, shape)
        codes, computed = quantize(moved, fmt, given, granularity=granularity, kv_layout=kv_layout)
        if scale is None:
            scale = call.library.from_numpy(gpu.to_numpy(computed), HOST)
        return call.codes_from_numpy(gpu.to_numpy(codes), fmt), scale

    library, facts = call.library, call.facts
    axes = RowAxes(facts.shape, facts.strides)
    quantizer = Quantizer(facts.dtype, fmt.name, call.device)
    strides = axes.scale_strides(shape, call.head_axis)
    stream = library.stream(call.device)
    computed = None
    if scale is None:
        computed, address = library.empty(shape, "float32", call.device)
        quantizer.amax(axes, call.address, address, strides, math.prod(shape), stream)
        known, held = 1.0, computed
    else:
        known, address, held = call.device_scale(scale, shape)
    codes, codes_address = library.empty(facts.shape, "uint8", call.device)
    quantizer.convert("quantize", axes, call.address, codes_address, address, known, strides, stream)
    del held
    return (
        library.view_fp8(library.wrap(codes), fmt.dtype.name),
        scale if computed is None else library.wrap(computed),
    )


def dequantize(
    codes: Any,
    scale: Any = None,
    dtype: Any = "float16",
    *,
    kv_format: Any = None,
    kv_layout: str = "NHD",
    backend: str | None = None,
) -> Any:
    """FP8 codes to floats: ``decode(codes) * scale``, multiplied in float32, then rounded to ``dtype``.

    Parameters
    ----------
    codes : array ``[..., D]`` of at most four axes, uint8 or an FP8 type; D a multiple of 16.
    scale : a number, or a float array of one element, ``[H]`` or ``codes.shape[:-1]``; None: 1.
    dtype : float16, bfloat16 or float32, as a string or a dtype of any library.
    kv_format : what uint8 codes mean; default ``"e4m3"``.

    Returns
    -------
    Array like ``codes``, of ``dtype``. What exceeds it becomes infinite.
    """
    out_dtype = float_dtype(dtype)
    call = _Call.of(codes, "codes", _CODE_DTYPES, kv_layout, backend)
    library, facts = call.library, call.facts
    fmt = _format_of_codes(facts, kv_format)
    scale = 1.0 if scale is None else scale
    shape = call.shape_of(scale)
    if not call.cuda:
        known: Any = call.host_scale(scale, shape)
        values = reference.dequantize(
            library.to_numpy(call.array), fmt, known, arrays.numpy_dtype(out_dtype), head_axis=call.head_axis
        )
        return library.from_numpy(values, call.device)
    if call.device == HOST:
        gpu, moved = call.uploaded()
        given = call.host_scale(scale, shape)
        values = dequantize(moved, given, out_dtype, kv_format=fmt, kv_layout=kv_layout)
        return library.from_numpy(gpu.to_numpy(values), HOST)

    axes = RowAxes(facts.shape, facts.strides)
    known, address, held = call.device_scale(scale, shape)
    values, values_address = library.empty(facts.shape, out_dtype, call.device)
    Quantizer(out_dtype, fmt.name, call.device).convert(
        "dequantize", axes, call.address, values_address, address, known,
        axes.scale_strides(shape, call.head_axis), library.stream(call.device),
    )  # fmt: skip
    del held
    return library.wrap(values)


def _format_of_codes(facts: Facts, requested: Any) -> KVFormat:
    carried = format_of_dtype(facts.dtype, "codes")
    if requested is None:
        return carried
    asked = format_called(requested)
    if not asked.is_fp8 or (facts.dtype != "uint8" and asked != carried):
        raise ValueError(f"kv_format: {asked.name} asked for, but codes is an array of {facts.dtype}")
    return asked


@dataclass(frozen=True)
class _Call:
    """What both operations need of their array, checked."""

    array: Any
    argument: str
    library: Library
    facts: Facts
    address: int
    head_axis: int
    cuda: bool

    @classmethod
    def of(cls, array: Any, argument: str, dtypes: tuple[str, ...], kv_layout: str, backend: str | None) -> _Call:
        array = arrays.adopt(array, argument)
        library = arrays.library_of(array, argument)
        assert library is not None  # adopt() leaves no other
        address, signature = arrays.read(library, array, argument)
        facts = library.facts(signature)
        if facts.dtype not in dtypes:
            raise TypeError(f"{argument}: expected {', '.join(dtypes)}, got {facts.dtype}")
        if not 1 <= len(facts.shape) <= 4:
            raise ValueError(f"{argument}: expected 1 to 4 axes [..., D], got shape {list(facts.shape)}")
        if facts.shape[-1] % 16 or not facts.shape[-1]:
            raise ValueError(f"{argument}: expected a last axis that is a multiple of 16, got {facts.shape[-1]}")
        check_backend(backend)
        # With fewer than three axes the one before the last counts as the heads.
        ndim = len(facts.shape)
        head = token_head_axes(kv_layout, max(ndim, 3))[1]
        cuda = backend == "cuda" or (backend is None and facts.device != HOST)
        if cuda and not has_gpu():
            raise RuntimeError(f"backend: cuda was asked for: {cupy_problem()}")
        if cuda and facts.device != HOST:
            check_rows(argument, facts, arrays.numpy_dtype(facts.dtype).itemsize)
            check_address(argument, address)
        return cls(array, argument, library, facts, address, head if ndim >= 3 else ndim - 2, cuda)

    @property
    def device(self) -> int:
        return self.facts.device

    def computed_shape(self, granularity: str) -> tuple[int, ...]:
        shape = self.facts.shape
        if granularity == "head" and len(shape) < 3:
            raise ValueError(f"granularity: 'head' needs {self.argument} [(batch,) L, H, D], got shape {list(shape)}")
        if granularity == "tensor" or len(shape) == 1:
            return (1,)
        return (shape[self.head_axis],) if granularity == "head" else tuple(shape[:-1])

    def shape_of(self, scale: Any) -> tuple[int, ...]:
        """The shape of a given scale, with ``(1,)`` for a number or a single element. ValueError if it does not fit."""
        if is_number(scale):
            return (1,)
        scale_library(scale, "scale")
        got, shape = tuple(scale.shape), self.facts.shape
        if got in ((), (1,)):
            return (1,)
        heads = (shape[self.head_axis],) if len(shape) >= 3 else ()
        if got and got in (heads, tuple(shape[:-1])):
            return got
        expected = f"[1], {list(heads)} or {list(shape[:-1])}" if heads else f"[1] or {list(shape[:-1])}"
        raise ValueError(f"scale: expected a number or an array {expected}, got shape {list(got)}")

    def host_scale(self, scale: Any, shape: tuple[int, ...]) -> Any:
        """A given scale as float32 in NumPy (a number is left one); None stays None."""
        if scale is None or is_number(scale):
            return scale
        source = scale_library(scale, "scale")
        return np.asarray(source.to_numpy(scale), np.float32).reshape(shape)

    def device_scale(self, scale: Any, shape: tuple[int, ...]) -> tuple[float, int, Any]:
        """(number, address, what keeps it alive): one of the first two is what the kernel uses."""
        if is_number(scale):
            return number(scale, "scale"), 0, None
        source = scale_library(scale, "scale")
        _, signature = source.read(scale)
        facts = source.facts(signature)
        if facts.device == HOST:
            values = self.host_scale(scale, shape)
            if values.size == 1:
                return float(values[0]), 0, None
            refuse_capture(self.library.stream(self.device), "scale")
            scale, address = arrays.upload(self.library, values, self.device)
            return 1.0, address, scale
        if source is not self.library or facts.device != self.device:
            raise ValueError(
                f"scale: expected an array of {self.library.name} on device {self.device} like {self.argument}, "
                f"got one of {source.name} on device {facts.device}"
            )
        if facts.dtype != "float32" or not facts.is_contiguous(4):
            refuse_capture(self.library.stream(self.device), "scale", "contiguous float32")
        scale = source.as_float32(scale)
        return 1.0, source.read(scale)[0], scale

    def uploaded(self) -> tuple[Library, Any]:
        gpu = arrays.cupy_library()
        return gpu, gpu.from_numpy(self.library.to_numpy(self.array), 0)

    def codes_from_numpy(self, codes: np.ndarray, fmt: KVFormat) -> Any:
        return self.library.view_fp8(self.library.from_numpy(codes, self.device), fmt.dtype.name)
