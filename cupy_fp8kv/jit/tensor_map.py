"""Descriptions of caches for the copy engine (TMA): what ``attention/ring.cuh`` copies boxes by."""

from __future__ import annotations

import ctypes

from ..formats import KV_FORMATS
from ..problem import DecodeProblem
from ..ring_plans import box_rows
from .device import driver_function
from .params import TENSOR_MAP_BYTES
from .spec import DecodeSpec

_UINT32 = 2  # CU_TENSOR_MAP_DATA_TYPE_UINT32
_PROMOTE_TO_256_BYTES = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B, some 0.2 % faster than 128
#: By the length of a piece.
SWIZZLES = {32: 1, 64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE_*; none for other lengths of a piece
_AXES = 5
#: Pairs of caches whose maps are kept, for callers with many layers.
_MOST_KEPT = 512


def encode_tiled(
    to: int, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> None:
    """Write the map of an array of 32-bit words to ``to``, which is a multiple of 64. Innermost axis first."""
    function = driver_function("cuTensorMapEncodeTiled", 12)
    arguments = (
        (ctypes.c_uint64 * _AXES)(*sizes), (ctypes.c_uint64 * (_AXES - 1))(*strides), (ctypes.c_uint32 * _AXES)(*box),
        (ctypes.c_uint32 * _AXES)(*[1] * _AXES),
    )  # fmt: skip
    error = 801  # CUDA_ERROR_NOT_SUPPORTED
    if function is not None:
        pointers = [ctypes.addressof(argument) for argument in arguments]
        error = function(to, _UINT32, _AXES, address, *pointers, 0, swizzle, _PROMOTE_TO_256_BYTES, 0)
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled failed with CUDA driver error {error} on sizes {sizes}, {strides}")


#: Sizes, strides, box and swizzle of an array.
_Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


class TensorMaps:
    """The maps of K and V of one kind of call; they only depend on the addresses."""

    def __init__(self, problem: DecodeProblem, spec: DecodeSpec):
        self._caches = [
            self._geometry(problem, spec, strides, problem.head_dim * KV_FORMATS[name].itemsize)
            for name, strides in ((problem.k_format, problem.k_strides), (problem.v_format, problem.v_strides))
        ]
        self._scratch = ctypes.create_string_buffer(TENSOR_MAP_BYTES + 64)
        self._aligned = -(-ctypes.addressof(self._scratch) // 64) * 64
        self._kept: dict[tuple[int, int], bytes] = {}
        self._written: tuple[int, int] | None = None

    @staticmethod
    def _geometry(problem: DecodeProblem, spec: DecodeSpec, strides: tuple[int, int, int], row_bytes: int) -> _Geometry:
        # attention/ring.cuh, RingBox
        piece = 128 if row_bytes % 128 == 0 else row_bytes
        request, row, head = (stride or row_bytes for stride in strides)
        paging = problem.paging
        rows, outer = (paging.page_size, paging.num_pages) if paging else (problem.kv_len, problem.batch)
        sizes = (piece // 4, row_bytes // piece, problem.num_kv_heads, rows, outer)
        box = (piece // 4, row_bytes // piece, spec.heads, box_rows(problem, spec), 1)
        return sizes, (piece, head, row, request), box, SWIZZLES.get(piece, 0)

    def write(self, k: int, v: int, to: memoryview) -> None:
        """Write both maps of caches at these addresses. ``to`` is in an argument block that nobody else has."""
        caches = k, v
        if caches == self._written:
            return
        maps = self._kept.get(caches)
        if maps is None:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            maps = self._kept[caches] = self._encode(k, self._caches[0]) + self._encode(v, self._caches[1])
        to[:] = maps
        self._written = caches

    def _encode(self, address: int, geometry: _Geometry) -> bytes:
        encode_tiled(self._aligned, address, *geometry)
        return ctypes.string_at(self._aligned, TENSOR_MAP_BYTES)
