"""Other systems that decode over an FP8 cache, as the benchmark calls them: with torch, on our input sets' memory.

Nothing is imported to look which there are. Each is called as its own documentation does, with everything that a
serving loop would prepare once a step or less often (plans, tables, workspaces) made outside the timing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any

import numpy as np

from .inputs import InputSets, PageTable
from .report import PeerInfo
from .suites import Shape

#: What FlashInfer and TensorRT-LLM's kernels are given to work in.
_WORKSPACE_BYTES = 512 << 20
#: vLLM's older kernel is told a number of splits: as many as give some CTAs to each SM of a large GPU.
_VLLM_DECODE_CTAS = 528
#: Rows of pages that XQA has kernels for.
_XQA_PAGES = (16, 32, 64, 128)
_TORCH_DTYPES = {"f16": "float16", "bf16": "bfloat16", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}

Call = Callable[[int], Any]


class UnsupportedError(Exception):
    """The system has no such case."""


class TorchInputs:
    """Input sets as torch tensors on the same memory."""

    def __init__(self, torch: Any, inputs: InputSets):
        self.torch, self.shape, self.table = torch, inputs.shape, inputs.table

        def tensor(array: Any, name: str) -> Any:
            # As bytes: torch takes no FP8 type from CuPy.
            return torch.from_dlpack(array.view(np.uint8)).view(getattr(torch, _TORCH_DTYPES[name]))

        self.qs = [tensor(q, self.shape.q) for q in inputs.qs]
        self.ks = [tensor(k, self.shape.k) for k, _ in inputs.caches]
        self.vs = [tensor(v, self.shape.v) for _, v in inputs.caches]
        self.device = self.qs[0].device
        self.group = self.shape.num_qo_heads // self.shape.num_kv_heads
        self.sm_scale = self.shape.head_dim**-0.5

    @cached_property
    def lengths(self) -> Any:
        return self.torch.tensor(self.shape.lengths, dtype=self.torch.int32, device=self.device)

    def ones(self, *shape: int) -> Any:
        return self.torch.ones(shape, dtype=self.torch.float32, device=self.device)

    def need_plain(self, layouts: Sequence[str] = ("NHD",)) -> None:
        """UnsupportedError for anything but fp16 queries over E4M3FN in one of these layouts with one scale."""
        shape = self.shape
        plain = (shape.q, shape.k, shape.v, shape.head_scales) == ("f16", "e4m3", "e4m3", False)
        if not plain or shape.kv_layout not in layouts:
            raise UnsupportedError(f"compared on fp16 queries over E4M3FN, {' or '.join(layouts)}, one scale")

    def page_size(self, usual: int | None) -> int:
        """Rows of a page: the shape's own; of a padded cache ``usual``, or all rows of a request."""
        if self.shape.page_size and usual is None:
            raise UnsupportedError("a page a request")
        return self.shape.page_size or usual or self.shape.kv_len


class Pages:
    """Pools of pages, as the shape has them; or a padded cache as such: then each request has its own part of them.

    The pages lie in random order, as in a server.
    """

    def __init__(self, inputs: TorchInputs, page: int):
        shape, torch = inputs.shape, inputs.torch
        csr = inputs.table or _table_of_padded(shape, page)
        counts = np.diff(csr.indptr)
        self.host_table = np.zeros((shape.batch, counts.max()), np.int32)
        for request, (begin, count) in enumerate(zip(csr.indptr, counts, strict=False)):
            self.host_table[request, :count] = csr.indices[begin : begin + count]
        self.table = torch.from_numpy(self.host_table).to(inputs.device)
        self.indptr = torch.from_numpy(csr.indptr)
        self.indices = torch.from_numpy(csr.indices).to(inputs.device)
        self.last_page_len = torch.from_numpy(csr.last_page_len)
        pool = shape.cache_shape if shape.page_size else (-1, page, shape.num_kv_heads, shape.head_dim)
        self.caches = [(k.view(pool), v.view(pool)) for k, v in zip(inputs.ks, inputs.vs, strict=True)]


def _table_of_padded(shape: Shape, page: int) -> PageTable:
    if shape.kv_len % page:
        raise UnsupportedError(f"rows are no multiple of a page of {page}")
    per_request, rng = shape.kv_len // page, np.random.default_rng(1)
    indices = []
    for request, length in enumerate(shape.lengths):
        pages = request * per_request + np.arange(-(-length // page))
        whole = length // page  # a part of a page stays the last one
        pages[:whole] = rng.permutation(pages[:whole])
        indices.append(pages)
    return PageTable.of(shape.lengths, page, np.concatenate(indices))


def _torch_sdpa(inputs: TorchInputs, upcast_inside: bool) -> Call:
    torch, shape = inputs.torch, inputs.shape
    if shape.page_size:
        raise UnsupportedError("no pages")
    if shape.kv_lens is not None:
        raise UnsupportedError("one length for all")
    if shape.head_scales:
        raise UnsupportedError("no scales")
    attend = torch.nn.functional.scaled_dot_product_attention
    dtype = getattr(torch, _TORCH_DTYPES[shape.q])

    def wide(cache: Any) -> Any:
        cache = cache.to(dtype)
        return cache.transpose(1, 2) if shape.kv_layout == "NHD" else cache

    def attention(q: Any, k: Any, v: Any) -> Any:
        return attend(q[:, :, None], k, v, enable_gqa=inputs.group > 1)

    if upcast_inside:
        return lambda s: attention(inputs.qs[s], wide(inputs.ks[s]), wide(inputs.vs[s]))
    # Twice the bytes, so half the sets would do; but a call must find what its number says.
    caches = [(wide(k), wide(v)) for k, v in zip(inputs.ks, inputs.vs, strict=True)]
    return lambda s: attention(inputs.qs[s], *caches[s])


def _flashinfer(inputs: TorchInputs, page: int | None, tensor_cores: bool) -> Call:
    import flashinfer

    torch, shape = inputs.torch, inputs.shape
    inputs.need_plain(("NHD", "HND") if shape.page_size else ("NHD",))  # views of padded HND caches are no pages
    page = inputs.page_size(page)
    pages = Pages(inputs, page)
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, shape.kv_layout, use_tensor_cores=tensor_cores, backend="fa2" if tensor_cores else "auto"
    )
    wrapper.plan(
        pages.indptr, pages.indices, pages.last_page_len, shape.num_qo_heads, shape.num_kv_heads, shape.head_dim, page,
        q_data_type=torch.float16, kv_data_type=torch.float8_e4m3fn, o_data_type=torch.float16,
    )  # fmt: skip
    return lambda s: wrapper.run(inputs.qs[s], pages.caches[s])


def _xqa(inputs: TorchInputs) -> Call:
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    inputs.need_plain()
    torch, page = inputs.torch, inputs.page_size(64)
    if page not in _XQA_PAGES:
        raise UnsupportedError(f"pages of {', '.join(map(str, _XQA_PAGES))} rows")
    pages = Pages(inputs, page)
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.device)
    lengths, most = inputs.lengths.view(torch.uint32), pages.host_table.shape[1] * page
    return lambda s: xqa_batch_decode_with_kv_cache(
        inputs.qs[s], pages.caches[s], workspace, pages.table, lengths, most, bmm1_scale=inputs.sm_scale, bmm2_scale=1.0
    )


def _vllm_unified(inputs: TorchInputs, always_split: bool) -> Call:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    inputs.need_plain()
    torch, shape = inputs.torch, inputs.shape
    threshold, segments = 128 // shape.num_kv_heads, 16  # vLLM splits the rows of at most so many requests, in so many
    if always_split:
        if shape.batch <= threshold:
            raise UnsupportedError("vLLM splits it anyway")
        threshold = shape.batch
    pages = Pages(inputs, inputs.page_size(16))
    most, width = max(threshold, shape.batch), 1 << (shape.head_dim - 1).bit_length()
    partial = [inputs.ones(most, shape.num_qo_heads, segments, *more) for more in ((width,), (), ())]
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=inputs.device)
    one = inputs.ones(1)

    def call(s: int) -> Any:
        out = torch.empty_like(inputs.qs[s])
        k, v = pages.caches[s]
        unified_attention(
            q=inputs.qs[s], k=k, v=v, out=out, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=inputs.lengths,
            max_seqlen_k=max(shape.lengths), softmax_scale=inputs.sm_scale, causal=True, window_size=(-1, -1),
            block_table=pages.table, softcap=0.0, q_descale=None, k_descale=one, v_descale=one,
            seq_threshold_3D=threshold, num_par_softmax_segments=segments, softmax_segm_output=partial[0],
            softmax_segm_max=partial[1], softmax_segm_expsum=partial[2], kv_quant_mode=KVQuantMode.FP8_PER_TENSOR,
        )  # fmt: skip
        return out

    return call


def _vllm_decode(inputs: TorchInputs) -> Call:
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    inputs.need_plain()
    torch, shape, page = inputs.torch, inputs.shape, inputs.page_size(16)
    pages = Pages(inputs, page)
    heads = shape.num_qo_heads if inputs.group == 1 else -(-shape.num_qo_heads // min(16, inputs.group))
    splits = 1
    while splits < 64 and splits * shape.batch * heads < _VLLM_DECODE_CTAS:
        splits *= 2
    partial = inputs.ones(shape.batch, shape.num_qo_heads, splits, shape.head_dim + 1)
    lse, one = inputs.ones(shape.batch, shape.num_qo_heads), inputs.ones(1).reshape(())

    def call(s: int) -> Any:
        out = torch.empty_like(inputs.qs[s])
        decode_attention_fwd(
            inputs.qs[s], *pages.caches[s], out, lse, pages.table, inputs.lengths, partial, splits, inputs.sm_scale,
            page, k_scale=one, v_scale=one,
        )  # fmt: skip
        return out

    return call


def _fa3(inputs: TorchInputs, page: int | None) -> Call:
    from vllm.vllm_flash_attn import flash_attn_interface

    inputs.need_plain()
    torch, shape = inputs.torch, inputs.shape
    page = inputs.page_size(page)
    pages = Pages(inputs, page)
    qs = [q.to(torch.float8_e4m3fn) for q in inputs.qs]  # the only type it takes with FP8 caches
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=inputs.device)
    one = inputs.ones(shape.batch, shape.num_kv_heads)
    most = max(shape.lengths)
    schedule = flash_attn_interface.get_scheduler_metadata(
        shape.batch, 1, most, shape.num_qo_heads, shape.num_kv_heads, shape.head_dim, cache_seqlens=inputs.lengths,
        qkv_dtype=torch.float8_e4m3fn, cu_seqlens_q=starts, page_size=page, causal=False,
        num_splits=0,
    )  # fmt: skip
    return lambda s: flash_attn_interface.flash_attn_varlen_func(
        qs[s], *pages.caches[s], max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=most, seqused_k=inputs.lengths,
        block_table=pages.table, softmax_scale=inputs.sm_scale, causal=False, fa_version=3, q_descale=one,
        k_descale=one, v_descale=one, scheduler_metadata=schedule, num_splits=0,
    )  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """``prepare`` gives what decodes set s into an array of any float type; UnsupportedError, or what it raises.

    ``tolerance``: relative L2 above which it is not the same operation.
    """

    name: str
    title: str
    family: str
    module: str
    distribution: str
    prepare: Callable[[TorchInputs], Call]
    tolerance: float = 5e-3

    @property
    def importable(self) -> bool:
        """Whether its package is installed; torch is needed by all."""
        return all(importlib.util.find_spec(name) is not None for name in ("torch", self.module))

    def info(self) -> PeerInfo:
        try:
            version = f"{self.distribution} {metadata.version(self.distribution)}"
        except metadata.PackageNotFoundError:
            version = f"{self.distribution} of unknown version"
        return PeerInfo(self.title, self.family, version)


_FLASHINFER = ("FlashInfer", "flashinfer", "flashinfer-python")
_VLLM = ("vLLM Triton", "vllm", "vllm")
_TORCH = ("torch SDPA", "torch", "torch")
PEERS = (
    Peer("torch-fp16", "SDPA over an fp16 cache, made outside the timing", *_TORCH, lambda i: _torch_sdpa(i, False)),
    Peer("torch-upcast", "SDPA, the cache converted in the call", *_TORCH, lambda i: _torch_sdpa(i, True)),
    Peer("fi-cc", "CUDA cores, pages of 16 or the shape's", *_FLASHINFER, lambda i: _flashinfer(i, 16, False)),
    Peer("fi-tc", "tensor cores, pages of 16 or the shape's", *_FLASHINFER, lambda i: _flashinfer(i, 16, True)),
    Peer("fi-tc-padded", "tensor cores, a page a request", *_FLASHINFER, lambda i: _flashinfer(i, None, True)),
    Peer("fi-xqa", "XQA, pages of 64 or the shape's; computes in FP8", *_FLASHINFER, _xqa, 6e-2),
    Peer("vllm-unified", "unified attention, pages of 16 or the shape's", *_VLLM, lambda i: _vllm_unified(i, False)),
    Peer("vllm-split", "the same, always with splits", *_VLLM, lambda i: _vllm_unified(i, True)),
    Peer("vllm-decode", "decode attention, pages of 16 or the shape's", *_VLLM, _vllm_decode),
    Peer("fa3", "pages of 64 or the shape's; q given in FP8, computes in FP8", "FlashAttention-3", "vllm", "vllm",
         lambda i: _fa3(i, 64), 6e-2),
    Peer("fa3-padded", "a page a request", "FlashAttention-3", "vllm", "vllm", lambda i: _fa3(i, None), 6e-2),
)  # fmt: skip


def chosen(prefixes: Sequence[str]) -> list[Peer]:
    """Peers that are installed and whose names start with one of ``prefixes``; all installed ones without any.

    ValueError for a prefix that no peer's name starts with. ``["none"]`` chooses none.
    """
    if list(prefixes) == ["none"]:
        return []
    for prefix in prefixes:
        if not any(peer.name.startswith(prefix) for peer in PEERS):
            raise ValueError(f"no peer's name starts with {prefix!r}; there are {', '.join(p.name for p in PEERS)}")
    return [peer for peer in PEERS if peer.importable and (not prefixes or peer.name.startswith(tuple(prefixes)))]


def shapes_of(records: Sequence[dict[str, Any]]) -> list[Shape]:
    return [Shape(**{**one, "kv_lens": one["kv_lens"] and tuple(one["kv_lens"])}) for one in records]
