"""A handful of calls for compute-sanitizer: run by test_gpu_sanitizer.py, or by hand with PYTHONPATH=.:tests.

Every array is an allocation of its own, exactly as large as it is, so that an access beyond it is beyond an allocation.
"""

import dataclasses

import appends
import merges
import moves
import numpy as np
import pytest
from cases import Case, build
from gpu_support import assert_same_bits, cp, to_cupy, to_host
from listed import HUGE_AND_SMALL, lists_everywhere
from paged_cases import build_paged, paged

import cupy_fp8kv
from cupy_fp8kv import dispatch
from cupy_fp8kv.backends import cuda

CASES = [
    Case(head_dim=128, group=4, num_kv_heads=2, batch=2, kv_len=37),
    Case(head_dim=80, group=12, batch=2, kv_len=17, k="e5m2", v="f16", q="bf16", layout="HND"),
    Case(head_dim=16, group=1, batch=3, kv_len=1, soft_cap=30.0, scales="head"),
    Case(head_dim=256, group=16, batch=2, kv_len=33, k="f16", v="bf16"),
    Case(head_dim=128, group=5, batch=4, kv_len=900, kv_lens="device", lens=(900, 0, 1, 17), scales="scalar"),
    Case(head_dim=64, group=8, kv_len=4000, window_left=2999, given_out=True, view="padded"),
    Case(head_dim=240, group=33, num_kv_heads=3, batch=2, kv_len=47, view="transposed", k="bf16"),
    Case(head_dim=48, group=3, kv_len=0, batch=2),
]


PAGED_CASES = [
    paged(16, group=4, num_kv_heads=2, batch=3, kv_len=77, lens=(77, 0, 16)),
    paged(1, "pair", "blocks", group=3, num_kv_heads=2, batch=2, kv_len=40, lens=(40, 17), layout="HND"),
    paged(5, head_dim=32, group=7, batch=2, kv_len=600, lens=(600, 1), window_left=100),
    paged(64, head_dim=256, group=12, batch=1, kv_len=2000, lens=(1999,), k="f16", v="f16", view="padded"),
    paged(3, "pair", head_dim=64, group=5, batch=2, kv_len=70, lens=(70, 69), k="bf16", v="e5m2", view="transposed"),
]


def check(case, software):
    arrays = build(case)
    original = cuda.plan_decode
    dispatch._prepared.clear()
    if software:
        cuda.plan_decode = lambda problem, info: dataclasses.replace(
            original(problem, info), spec=dataclasses.replace(original(problem, info).spec, software_fp8=True)
        )
    try:
        out, lse = arrays.to(to_cupy).call()
    finally:
        cuda.plan_decode = original
    arrays.check(to_host(out), to_host(lse))


def beside_decode():
    """Appends, moves of pages and merges; how many."""
    cases = appends.pairwise_cases()[::6]
    for case in cases:
        problem = appends.build(case).to(lambda x: to_cupy(np.ascontiguousarray(x)))
        problem.call()
        problem.check(lambda x: np.ascontiguousarray(to_host(x)))
    for case in (moves.CASES[1], moves.CASES[7], moves.CASES[10]):
        pool = moves.build(case).to(lambda x: to_cupy(np.ascontiguousarray(x)))
        k, _, *_ = cupy_fp8kv.gather(
            pool.cache, pool.indptr, pool.indices, pool.last, case.layout, max_kv_len=53, **pool.scales
        )
        assert_same_bits(k, pool.padded("k", 53))
        cupy_fp8kv.copy_pages(pool.cache, [0, 1], [2, 3], case.layout, **pool.scales)
    for shape in ((5, 7, 3, 128), (2, 2, 2, 1024)):
        v, s = merges.states(shape, "float16")
        merged = cupy_fp8kv.merge_states(to_cupy(v), to_cupy(s))
        merges.check(*map(to_host, merged), *merges.merged(v, s), "float16")
    return len(cases) + 5


def main():
    cp.cuda.set_allocator(None)
    done = 0
    for case in CASES:
        for software in (False, True) if case.head_dim in (128, 80) else (False,):
            check(case, software)
            done += 1
    for case in PAGED_CASES:
        arrays = build_paged(case)
        out, lse = arrays.to(to_cupy).call()
        arrays.check(to_host(out), to_host(lse))
    with pytest.MonkeyPatch.context() as patch, lists_everywhere(patch):
        check(HUGE_AND_SMALL, False)
        done += 1
    values = np.random.default_rng(0).standard_normal((3, 7, 5, 48), np.float32)
    for dtype in (np.float16, np.float32):
        for granularity in ("tensor", "head", "token"):
            given = to_cupy(values.astype(dtype))
            codes, scale = cupy_fp8kv.quantize(given, granularity=granularity)
            want, want_scale = cupy_fp8kv.quantize(values.astype(dtype), granularity=granularity, backend="numpy")
            assert (to_host(codes) == want.view(np.uint8)).all() and (to_host(scale) == want_scale).all()
            for out_dtype in ("float16", "bfloat16", "float32"):
                assert cupy_fp8kv.dequantize(codes, scale, out_dtype).shape == values.shape
            done += 1
    done += beside_decode()
    cp.cuda.runtime.deviceSynchronize()
    print(f"ran {done} calls")


if __name__ == "__main__":
    main()
