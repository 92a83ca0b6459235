"""The calls that compute-sanitizer sees run every kind of kernel, and are few and small."""

import dataclasses
import itertools

import emulator
import every_kernel
import numpy as np
import pytest
from cases import H100
from emulator.checks import move
from every_kernel import Place, all_kinds, calls, kind, launches

from cupy_fp8kv.formats import FP8_FORMATS, KV_FORMATS
from cupy_fp8kv.jit import compiler
from cupy_fp8kv.jit.spec import DecodeSpec
from cupy_fp8kv.layouts import LAYOUTS

#: By architecture: an H100, a device without the copy engine, and one without the shared memory for rings.
DEVICES = {90: H100} | {arch: dataclasses.replace(H100, arch=arch, shared_per_block=101376) for arch in (89, 120)}


class Planner(emulator.Emulator):
    """Compiles and runs nothing: calls go their way as far as the launch."""

    def load(self, spec, device):
        return compiler.Kernel(spec, 0, 0, spec.threads, spec.shared_bytes, None)

    def launch_kernel(self, handle, grid, *rest):
        self.launches.append(("", grid))


def planned(folder, device):
    """The specialisations that are launched, and their grids."""
    machine = Planner(folder)
    with pytest.MonkeyPatch.context() as patch, machine.installed(patch), launches() as launched:
        for _, call in calls(Place(move, lambda array: array, device)):
            call()
    return launched, [grid for _, grid in machine.launches]


@pytest.fixture(scope="module")
def by_arch(tmp_path_factory):
    return {arch: planned(tmp_path_factory.mktemp("nothing"), device) for arch, device in DEVICES.items()}


@pytest.mark.parametrize("arch", DEVICES)
def test_every_kind_of_kernel_is_launched(by_arch, arch):
    launched, _ = by_arch[arch]
    assert {kind(spec) for spec in launched} == all_kinds(DEVICES[arch])


def test_kinds_tell_apart_what_is_written_for_itself():
    """Schedule, layout, rings and several rows of q; every other entry point."""
    kinds = all_kinds(H100)
    assert {f"merge {schedule}" for schedule in ("uniform", "listed", "even")} <= {
        " ".join(name.split()[:2]) for name in kinds
    }
    assert {
        "decode uniform padded", "decode listed padded", "decode uniform padded ring", "decode even padded ring",
        "decode uniform paged", "decode even paged ring", "decode uniform paged many_queries",
        "decode even paged ring many_queries", "merge even paged many_queries", "schedule", "check_tables",
        "merge_given", "amax", "scales", "quantize", "dequantize", "copy_pages[word=4]", "gather[word=16]",
        "append to e4m3", "append[bytes=2]",
    } <= kinds  # fmt: skip
    for arch in (89, 120):
        assert all_kinds(DEVICES[arch]) == {name for name in kinds if "ring" not in name and "even" not in name}


@pytest.mark.parametrize("arch", DEVICES)
def test_every_format_and_shape_is_among_them(by_arch, arch):
    launched, _ = by_arch[arch]
    decode = [spec for spec in launched if isinstance(spec, DecodeSpec)]
    for layout in LAYOUTS:
        here = [spec for spec in decode if spec.layout == layout]
        straight = [spec for spec in here if not spec.stages]
        assert {spec.k for spec in straight} >= {"e4m3", "f16", "bf16"}
        assert {spec.column_tiles for spec in here} == {1, 2}
        assert {spec.head_dim for spec in straight} >= {64, 128, 256}
    assert {spec.k for spec in decode} == set(KV_FORMATS) == {spec.v for spec in decode}
    assert {spec.q for spec in decode} == {"f16", "bf16"}
    assert {spec.soft_cap for spec in decode} == {spec.software_fp8 for spec in decode} == {False, True}
    padded = {spec.ctas_per_sm for spec in decode if not spec.stages and spec.layout == "padded"}
    assert padded == {1, 2, 4}
    rings = [spec for spec in decode if spec.stages]
    assert {(spec.schedule, spec.heads) for spec in rings} == (
        {("uniform", 1), ("uniform", 2), ("uniform", 4), ("even", 1), ("even", 2)} if arch == 90 else set()
    )
    assert {spec.codes for spec in launched if spec.entry == "quantize"} == set(FP8_FORMATS)


def test_equal_shares_are_merged_by_both_that_merge_them(by_arch):
    """By another kernel, or by the last CTA of a request."""
    launched, _ = by_arch[90]
    followed = {
        (one.layout, getattr(one, "many_queries", False), after.entry == "merge")
        for one, after in itertools.pairwise(launched) if isinstance(one, DecodeSpec) and one.schedule == "even"
    }  # fmt: skip
    assert followed == {
        (layout, many, merged)
        for layout, many in (("padded", False), ("paged", False), ("paged", True)) for merged in (False, True)
    }  # fmt: skip


def test_pages_of_many_sizes_in_both_layouts():
    paged = [*every_kernel.PAGED, every_kernel.PAGED_SPLIT, *(case for case, _ in every_kernel.EVEN_PAGED)]
    assert {case.page_size for case in paged} >= {1, 5, 16, 64, 256}
    for what, name in (("pages", "table"), ("one array or two", "form")):
        assert len({getattr(case, name) for case in paged}) == 2, what
    everything = [case.base for case in paged] + every_kernel.PADDED + every_kernel.RINGS
    assert {(case.layout, case.view) for case in everything} >= {
        ("NHD", "contiguous"), ("NHD", "padded"), ("NHD", "transposed"), ("HND", "contiguous"),
    }  # fmt: skip


@pytest.mark.parametrize("arch", DEVICES)
def test_they_are_few_and_small(by_arch, arch):
    """A tool that watches each access makes a launch take a second, and a kernel that is new to it another."""
    launched, grids = by_arch[arch]
    assert len(launched) == len(grids) <= 160 and len(set(launched)) <= 100
    assert max(grids) <= 150 and sum(grids) <= 3500
    everything = [*every_kernel.PADDED, *every_kernel.RINGS, *every_kernel.LISTS, *every_kernel.SPLIT]
    everything += [case for case, _ in every_kernel.EVEN]
    everything += [case.base for case in every_kernel.PAGED] + [case.base for case, _ in every_kernel.EVEN_PAGED]
    assert max(case.kv_len for case in everything) <= 2000


# The calls' own checks


def test_every_call_notices_that_nothing_ran(tmp_path, monkeypatch):
    machine = Planner(tmp_path)
    with machine.installed(monkeypatch):
        for _, call in calls(Place(move, np.asarray, H100)):
            check = call()
            with pytest.raises(AssertionError):
                check()


@pytest.mark.parametrize("group", dict(calls(Place(move, np.asarray, H100))))
def test_the_first_call_of_each_group_is_right(emulate, group):
    """All of them on this CPU would take half a minute; what they are made of runs in the emulator's other tests."""
    before = len(emulate.launches)
    call = next(call for name, call in calls(Place(move, np.asarray, H100)) if name == group)
    call()()
    assert len(emulate.launches) > before
