"""A small set of calls that runs every kind of kernel: for tools that watch each access, and take their time over it.

A call launches and returns its check, so that what is launched can be told without running it. Plans are for a few SMs,
which makes them the same on every device of an architecture; kernels that planners take for long requests are forced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import appends
import cascades
import cases
import merges
import ml_dtypes
import moves
import numpy as np
import pytest
from cases import Case
from even import NAMED, even_everywhere
from listed import NAMED as LISTED
from listed import lists_everywhere
from paged_cases import PagedCase, build_paged, paged
from plans import plan_of, run_plan
from rings import take_ring

import cupy_fp8kv
from cupy_fp8kv import dispatch, plan, plan_types
from cupy_fp8kv.backends import cuda
from cupy_fp8kv.jit.covering import covering_specs
from cupy_fp8kv.jit.launch import Launch
from cupy_fp8kv.jit.spec import AppendSpec, DecodeSpec, MergeSpec, PagesSpec, Spec
from cupy_fp8kv.plan import DeviceInfo, Plan
from cupy_fp8kv.problem import DecodeProblem
from cupy_fp8kv.ring_plans import has_rings

Array = np.ndarray[Any, Any]
Check = Callable[[], None]

#: Straight to registers.
PADDED = [
    Case(head_dim=128, group=4, num_kv_heads=2, batch=2, kv_len=37),
    Case(head_dim=80, group=12, batch=2, kv_len=17, k="e5m2", v="f16", q="bf16", layout="HND"),
    Case(head_dim=16, group=1, batch=13, kv_len=1, soft_cap=30.0, scales="head"),
    Case(head_dim=256, group=16, batch=2, kv_len=33, k="f16", v="bf16"),
    Case(group=5, num_kv_heads=2, batch=4, kv_len=300, kv_lens="device", lens=(300, 0, 1, 17), scales="scalar"),
    Case(head_dim=64, group=8, kv_len=1500, window_left=1099, given_out=True, view="padded"),
    Case(head_dim=240, group=33, num_kv_heads=3, batch=2, kv_len=47, view="transposed", k="bf16"),
    Case(head_dim=48, group=3, kv_len=0, batch=2),
]
SOFTWARE = PADDED[:2]
SPLIT = [
    Case(group=5, num_kv_heads=2, batch=2, kv_len=300, view="padded", seed=1),
    Case(group=16, head_dim=64, q="bf16", batch=2, kv_len=300, kv_lens="device", lens=(300, 0), layout="HND", seed=2),
]
LISTS = [LISTED["huge_and_small"], dataclasses.replace(LISTED["wide_group"], layout="HND", q="bf16")]
#: The seed says which ring, how many stages it has and in how many splits a request is read.
RINGS = [
    Case(group=4, num_kv_heads=2, batch=2, kv_len=300, seed=1),
    Case(group=3, num_kv_heads=2, batch=1, kv_len=1000, seed=3, layout="HND", k="e5m2", v="e5m2", head_dim=64),
    Case(group=8, num_kv_heads=2, batch=2, kv_len=65, seed=4, view="padded", kv_lens="device", q="bf16"),
    Case(group=7, num_kv_heads=2, batch=1, kv_len=600, seed=6, window_left=333, head_dim=256),
    Case(group=2, num_kv_heads=1, batch=2, kv_len=300, seed=2, k="f16", v="f16", soft_cap=30.0),
    Case(group=16, num_kv_heads=4, batch=1, kv_len=300, seed=7, head_dim=96, given_out=True),
    Case(group=33, num_kv_heads=4, batch=1, kv_len=100, seed=3),
]
#: With the number of SMs: shares of each cache head, or of two together where one would leave SMs without work.
EVEN = [
    (NAMED["one"], 10), (NAMED["one"], 5), (NAMED["cuts"], 5), (NAMED["wide"], 6), (NAMED["long_rows"], 10),
    (dataclasses.replace(NAMED["windows"], layout="HND", q="bf16"), 15),
]  # fmt: skip
PAGED = [
    paged(16, group=4, num_kv_heads=2, batch=3, kv_len=77, lens=(77, 0, 16)),
    paged(1, "pair", "blocks", group=3, num_kv_heads=2, batch=2, kv_len=40, lens=(40, 17), layout="HND"),
    paged(5, head_dim=32, group=7, batch=2, kv_len=600, lens=(600, 1), window_left=100),
    paged(64, head_dim=256, group=12, batch=1, kv_len=1000, lens=(999,), k="f16", v="f16", view="padded"),
    paged(3, "pair", head_dim=64, group=5, batch=2, kv_len=70, lens=(70, 69), k="bf16", v="e5m2", view="transposed"),
]
PAGED_SPLIT = paged(16, group=3, num_kv_heads=2, batch=3, kv_len=300, lens=(300, 0, 77), layout="HND", seed=5)
#: Boxes of 8 rows, of 16 in pages of three, and of a whole turn.
EVEN_PAGED = [
    (paged(8, group=4, num_kv_heads=2, batch=3, kv_len=300, lens=(300, 0, 77), layout="HND", seed=1), 5),
    (paged(48, "pair", "blocks", group=5, num_kv_heads=2, batch=5, kv_len=400, lens=(400, 0, 133, 64, 257),
           window_left=130, seed=2), 10),
    (paged(256, group=12, batch=2, kv_len=900, lens=(900, 300), head_dim=64, q="bf16", seed=3), 5),
    (paged(16, head_dim=256, group=8, batch=2, kv_len=500, lens=(500, 33), where="host", shared=True, seed=4), 5),
]  # fmt: skip
APPENDS = [
    *appends.pairwise_cases()[::6],
    appends.Case(values="bf16", scales="token", counters=True, num_kv_heads=3, tables="device"),
    appends.Case(values="f32", k="bf16", v="bf16", together=False, form="padded", counters=True, layout="HND"),
    appends.Case(k="f16", v="f16", page_size=5),
]
MOVES = [moves.CASES[i] for i in (1, 4, 7, 10)]


@dataclass(frozen=True)
class Place:
    """Where calls run: how arrays get there and back, and the device that plans are for."""

    move: Callable[[Array], Any]
    download: Callable[[Any], Array]
    device: DeviceInfo

    @contextmanager
    def planned(self, choose: Callable[..., Plan] | None = None, sms: int = 6) -> Iterator[pytest.MonkeyPatch]:
        """Inside, calls are planned anew, by ``choose`` or as for a device of so many SMs."""
        some = dataclasses.replace(self.device, sm_count=sms)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "device_info", lambda index: some)
            patch.setattr(cuda, "tuned_plan", lambda *_: None)
            patch.setattr(dispatch, "_prepared", {})
            if choose:
                patch.setattr(cuda, "plan_decode", choose)
            yield patch

    @contextmanager
    def even(self, sms: int, merged_by_kernel: bool = False) -> Iterator[pytest.MonkeyPatch]:
        """Inside, equal shares are read, and merged by the last CTA of a request or by another kernel."""
        with self.planned(sms=sms) as patch, even_everywhere(patch):
            if merged_by_kernel:
                patch.setattr(plan_types, "_merges_inside", lambda *_: False)
            yield patch

    @contextmanager
    def listed(self) -> Iterator[pytest.MonkeyPatch]:
        with self.planned() as patch, lists_everywhere(patch):
            yield patch

    @contextmanager
    def ring(self, case: Case) -> Iterator[pytest.MonkeyPatch]:
        with self.planned() as patch:
            take_ring(patch, case, dataclasses.replace(self.device, sm_count=6))
            yield patch


def straight(problem: DecodeProblem, device: DeviceInfo) -> Plan:
    """Without rings, lists and equal shares."""
    return plan._uniform_plan(problem, device, *plan._tile(problem))


def in_software(problem: DecodeProblem, device: DeviceInfo) -> Plan:
    found = straight(problem, device)
    return dataclasses.replace(found, spec=dataclasses.replace(found.spec, software_fp8=True))


def in_splits(splits: int, problem: DecodeProblem, device: DeviceInfo) -> Plan:
    spec, blocks = plan._tile(problem)
    return plan.finish_plan(problem, device, spec, blocks, splits, "so many splits")


def decode(place: Place, how: Any, case: Case) -> Check:
    arrays = cases.build(case)
    with how:
        out, lse = arrays.to(place.move).call()
    return lambda: arrays.check(place.download(out), place.download(lse))


def decode_pages(place: Place, how: Any, case: PagedCase, **options: Any) -> Check:
    arrays = build_paged(case)
    with how:
        out, lse = arrays.to(place.move).call(**options)
    return lambda: arrays.check(place.download(out), place.download(lse))


def scheduled(place: Place, case: Case) -> Check:
    """A work list that is made once and run from twice."""
    arrays = cases.build(case)
    with place.listed():
        moved = arrays.to(place.move)
        made = plan_of(moved)
        made.schedule(moved.kv_lens)
        run_plan(made, moved)
        out, lse = run_plan(made, moved)
    return lambda: arrays.check(place.download(out), place.download(lse))


def cascade(place: Place, how: Any, name: str, group: int, layout: str = "NHD") -> Check:
    tree = cascades.Tree(*cascades.TREES[name], 2, group, layout=layout)
    wrapper = cupy_fp8kv.MultiLevelCascadeAttentionWrapper(len(tree.tables), None, layout)
    with how:
        tree.plan(wrapper, place.move)
        out, lse = wrapper.run(place.move(tree.q), place.move(tree.cache), **cascades.SCALES, return_lse=True)
    return lambda: tree.check(place.download(out), place.download(lse), **cascades.SCALES)


def shared_prefix(place: Place, group: int, layout: str) -> Check:
    tree = cascades.Tree(*cascades.TREES["a prefix"], 2, group, layout=layout)
    wrapper = cupy_fp8kv.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(None, layout)
    with place.planned():
        wrapper.plan(*map(place.move, tree.tables[1][1:]), 2 * group, 2, cascades.D, tree.page_size)
        q, k, v, cache = map(place.move, (tree.q, *cascades.prefix_of(tree), tree.cache))
        out, lse = wrapper.run(q, k, v, cache, **cascades.SCALES, return_lse=True)
    return lambda: tree.check(place.download(out), place.download(lse), **cascades.SCALES)


def append(place: Place, case: appends.Case) -> Check:
    problem = appends.build(case).to(place.move)
    problem.call()
    return lambda: problem.check(place.download)


def gather(place: Place, case: moves.Case) -> Check:
    pool = moves.build(case).to(place.move)
    got = cupy_fp8kv.gather(
        pool.cache, pool.indptr, pool.indices, pool.last, case.layout, max_kv_len=53, **pool.scales
    )  # fmt: skip

    def check() -> None:
        names = ("k", "v", "k_scales", "v_scales")
        for name, array in zip(names, got, strict=False):
            if name in pool.parts:
                appends.same_bits(place.download(array), np.ascontiguousarray(pool.padded(name, 53)), name)

    return check


def copy_pages(place: Place, case: moves.Case) -> Check:
    pool = moves.build(case).to(place.move)
    source, target = np.array([0, 1, 5]), np.array([2, 3, case.num_pages - 1])
    cupy_fp8kv.copy_pages(pool.cache, source, target, case.layout, **pool.scales)

    def check() -> None:
        for name, want in pool.expected_buffers(source, target).items():
            appends.same_bits(place.download(pool.buffers[name]), want, name)

    return check


def merge_states(place: Place, shape: tuple[int, int, int, int], dtype: str) -> Check:
    v, s = merges.states(shape, dtype)
    merged = cupy_fp8kv.merge_states(place.move(v), place.move(s))
    return lambda: merges.check(*map(place.download, merged), *merges.merged(v, s), dtype)


def merge_in_place(place: Place, on_device: bool) -> Check:
    """Tokens that a mask leaves out keep their bits."""
    v, s = merges.states((9, 2, 3, 64), "bfloat16")
    chosen = np.tile(np.array([True, False, False]), 3)
    given = [place.move(np.ascontiguousarray(part)) for i in range(2) for part in (v[:, i], s[:, i])]
    cupy_fp8kv.merge_state_in_place(*given, place.move(chosen) if on_device else chosen)

    def check() -> None:
        got = [place.download(array) for array in given[:2]]
        merges.check(*(array[chosen] for array in got), *(x[chosen] for x in merges.merged(v, s)), "bfloat16")
        for array, before in zip(got, (v, s), strict=True):
            appends.same_bits(array[~chosen], np.ascontiguousarray(before[~chosen, 0]), "left out")

    return check


def quantize(place: Place, dtype: Any, granularity: str, kv_format: str) -> Check:
    """And back, to every dtype."""
    values = np.random.default_rng(0).standard_normal((3, 7, 5, 48), np.float32).astype(dtype)
    codes, scale = cupy_fp8kv.quantize(place.move(values), kv_format, granularity=granularity)
    backs = {
        name: cupy_fp8kv.dequantize(codes, scale, name, kv_format=kv_format) for name in merges.DTYPES
    }  # fmt: skip

    def check() -> None:
        want, want_scale = cupy_fp8kv.quantize(values, kv_format, granularity=granularity, backend="numpy")
        assert np.array_equal(place.download(codes).view(np.uint8), want.view(np.uint8))
        np.testing.assert_array_equal(place.download(scale), want_scale)
        for name, back in backs.items():
            expected = cupy_fp8kv.dequantize(want, want_scale, name, kv_format=kv_format, backend="numpy")
            np.testing.assert_array_equal(place.download(back).astype(float), expected.astype(float), name)

    return check


def calls(place: Place) -> Iterator[tuple[str, Callable[[], Check]]]:
    """Every call with the name of its group. Rings are left out where a device has none."""
    for case in PADDED:
        yield "padded", partial(decode, place, place.planned(straight), case)
    for case in SOFTWARE:
        yield "conversion by integers", partial(decode, place, place.planned(in_software), case)
    for splits, case in enumerate(SPLIT, 2):
        yield "splits", partial(decode, place, place.planned(partial(in_splits, splits)), case)
    for case in LISTS:
        yield "work lists", partial(decode, place, place.listed(), case)
    yield "work lists", partial(scheduled, place, LISTED["huge_and_small"])
    for paged_case in PAGED:
        yield "pages", partial(decode_pages, place, place.planned(), paged_case)
    yield "pages", partial(decode_pages, place, place.planned(partial(in_splits, 3)), PAGED_SPLIT)
    yield "pages", partial(decode_pages, place, place.planned(), PAGED[0], validate=True)
    yield "cascades", partial(cascade, place, place.planned(), "a prefix", 4)
    yield "cascades", partial(cascade, place, place.planned(partial(in_splits, 3)), "three levels", 7, "HND")
    yield "cascades", partial(shared_prefix, place, 3, "HND")
    if has_rings(place.device.arch, place.device.shared_per_block):
        yield from _with_rings(place)
    for append_case in APPENDS:
        yield "append", partial(append, place, append_case)
    for move_case in MOVES:
        yield "moves of pages", partial(gather, place, move_case)
        yield "moves of pages", partial(copy_pages, place, move_case)
    for shape, dtype in (((5, 7, 3, 128), "float16"), ((2, 2, 2, 1024), "float16"), ((4, 9, 2, 48), "float32")):
        yield "merges", partial(merge_states, place, shape, dtype)
    for on_device in (False, True):
        yield "merges", partial(merge_in_place, place, on_device)
    for values, granularity, name in (
        (np.float16, "tensor", "e4m3"), (np.float32, "head", "e4m3"), (ml_dtypes.bfloat16, "token", "e4m3"),
        (np.float16, "head", "e5m2"),
    ):  # fmt: skip
        yield "quantize", partial(quantize, place, values, granularity, name)


def _with_rings(place: Place) -> Iterator[tuple[str, Callable[[], Check]]]:
    for case in RINGS:
        yield "rings", partial(decode, place, place.ring(case), case)
    for case, sms in EVEN:
        yield "equal shares", partial(decode, place, place.even(sms), case)
    for name in ("cuts", "wide"):
        yield "equal shares", partial(decode, place, place.even(10, merged_by_kernel=True), NAMED[name])
    for paged_case, sms in EVEN_PAGED:
        yield "equal shares of pages", partial(decode_pages, place, place.even(sms), paged_case)
    for paged_case, _ in EVEN_PAGED[::2]:
        how = place.even(10, merged_by_kernel=True)
        yield "equal shares of pages", partial(decode_pages, place, how, paged_case)
    yield "cascades", partial(cascade, place, place.even(5), "three levels", 4)
    yield "cascades", partial(cascade, place, place.even(10, merged_by_kernel=True), "a prefix", 4, "HND")


def kind(spec: Spec) -> str:
    """What tells kernels apart beside formats, shapes and options."""
    if isinstance(spec, DecodeSpec | MergeSpec):
        ring = " ring" if isinstance(spec, DecodeSpec) and spec.stages else ""
        return f"{spec.entry} {spec.schedule} {spec.layout}{ring}{' many_queries' * spec.many_queries}"
    if isinstance(spec, AppendSpec):
        return f"append to {spec.stored}" if spec.values else str(spec)
    return str(spec) if isinstance(spec, PagesSpec) else spec.entry


def all_kinds(device: DeviceInfo) -> set[str]:
    """What there is for a device: the kinds of all that is compiled for it."""
    specs = covering_specs(device.arch)
    if not has_rings(device.arch, device.shared_per_block):
        specs = [spec for spec in specs if not getattr(spec, "stages", 0) and getattr(spec, "schedule", "") != "even"]
    return {kind(spec) for spec in specs}


@contextmanager
def launches() -> Iterator[list[Spec]]:
    """Inside, the list gets the specialisation of every launch."""
    launched: list[Spec] = []
    original = Launch.start

    def start(self: Launch, stream: int) -> None:
        launched.append(self._spec)
        original(self, stream)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("start", "__call__"):
            patch.setattr(Launch, name, start)
        yield launched
