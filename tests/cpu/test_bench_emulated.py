"""The benchmark's own way through a run, on emulated kernels: everything but the clock and the device is real."""

import ctypes
import dataclasses
import json
from types import SimpleNamespace

import emulator
import numpy as np
import pytest

import cupy_fp8kv
from cupy_fp8kv import arrays, cli
from cupy_fp8kv.bench import (
    command,
    inputs,
    limit,
    measure,
    operation,
    operations,
    peer_process,
    shared_prefix,
    suites,
    timing,
)
from cupy_fp8kv.bench.operation import PageSizes
from cupy_fp8kv.bench.operations import SOURCES, Append, CopyPages, Gather, Merge
from cupy_fp8kv.bench.report import Report
from cupy_fp8kv.bench.shared_prefix import SharedPrefix
from cupy_fp8kv.bench.suites import Shape

SHAPES = (
    Shape("plain", 2, 40, 8, 2, 32),
    Shape("ragged", 3, 96, 4, 2, 32, kv_lens=(1, 96, 33)),
    Shape("mixed", 2, 48, 6, 2, 64, q="bf16", k="f16", v="e5m2", kv_layout="HND"),
    Shape("scaled", 1, 64, 3, 3, 16, head_scales=True),
)
PAGED = (
    SHAPES[0].in_pages(16),
    SHAPES[1].in_pages(5),
    SHAPES[2].in_pages(8, "HND"),
    SHAPES[3].in_pages(1),
)


SMALL = PageSizes(2, 32, 8)
OPERATIONS = (
    *(Append(f"append.{source}.b3", 3, 1, source, SMALL) for source in SOURCES),
    *(Append(f"append.{source}.b2.l3", 2, 3, source, SMALL) for source in SOURCES),
    *(Append(f"append.{source}.l29", 1, 29, source, SMALL) for source in SOURCES),
    CopyPages("copy_pages", 5, SMALL),
    Gather("gather", 3, 21, SMALL),
    Merge("merge_state", 5, 2, 4, 32),
    Merge("merge_states", 5, 3, 4, 32),
    SharedPrefix("prefix.copies", "copies", "", 6, 24, 13, 4, SMALL),
    SharedPrefix("prefix.tables", "tables", "prefix.copies", 6, 24, 13, 4, SMALL),
    SharedPrefix("prefix.wrapper", "wrapper", "prefix.copies", 6, 24, 13, 4, SMALL),
)


class DeviceArray(emulator.EmulatedArray):
    """With what CuPy arrays say of their memory."""

    @property
    def data(self):
        address = self.ctypes.data
        return SimpleNamespace(ptr=address, memset=lambda value, size: ctypes.memset(address, value, size))


class Library(type(emulator.library)):
    def empty(self, shape, dtype, device):
        array, address = super().empty(shape, dtype, device)
        return array.view(DeviceArray), address

    def from_numpy(self, values, device):
        return super().from_numpy(values, device).view(DeviceArray)


class Stream:
    ptr = 0

    def __init__(self, non_blocking=False):
        self.calls = 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def synchronize(self):
        pass

    def begin_capture(self):
        pass

    def end_capture(self):
        return SimpleNamespace(launch=lambda stream: None)


def fake_cupy():
    runtime = SimpleNamespace(
        getDevice=lambda: 0, deviceSynchronize=lambda: None, memcpyDeviceToDevice=3,
        getDeviceProperties=lambda index: {"l2CacheSize": 0},
        memcpyAsync=lambda to, source, size, kind, stream: ctypes.memmove(to, source, size),
    )  # fmt: skip
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    cuda = SimpleNamespace(
        runtime=runtime, Stream=Stream, Event=lambda: event, get_elapsed_time=lambda start, stop: 0.5,
        get_current_stream=lambda: SimpleNamespace(ptr=0), memory=SimpleNamespace(OutOfMemoryError=MemoryError),
    )  # fmt: skip
    library = Library()
    return SimpleNamespace(
        cuda=cuda,
        empty=lambda size, dtype: emulator.allocate(size * np.dtype(dtype).itemsize).view(dtype).view(DeviceArray),
        asarray=lambda values: library.from_numpy(values, 0),
        get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: None),
    )  # fmt: skip


@pytest.fixture
def bench(emulate, monkeypatch):
    """The emulator's device, to the benchmark."""
    cupy, library = fake_cupy(), Library()
    monkeypatch.setattr(arrays, "_by_type", {**arrays._by_type, DeviceArray: library})
    for module in (inputs, limit, measure, operation):
        monkeypatch.setattr(module, "require_cupy", lambda: cupy)
    for module in (inputs, operation):
        monkeypatch.setattr(module, "cupy_library", lambda: library)
    monkeypatch.setattr(inputs, "_BASE_ELEMENTS", 4096 + 16 * 5)
    monkeypatch.setattr(limit, "launch_kernel", lambda: emulate.launch_kernel)
    monkeypatch.setattr(limit, "device_info", lambda index: emulator.DEVICE)
    monkeypatch.setattr(limit, "VARIANTS", limit.VARIANTS[:1])
    monkeypatch.setattr(timing, "_MOST_CALLS", 2)
    monkeypatch.setattr(measure, "host_us", lambda *a, **k: 7.5)
    monkeypatch.setattr(measure, "machine_record", lambda: {"device": "emulated", "cupy": "0", "driver_cuda": "0"})
    monkeypatch.setattr(command, "cupy_problem", lambda: None)
    monkeypatch.setitem(suites.SUITES, "decode", SHAPES)
    monkeypatch.setitem(suites.SUITES, "paged", PAGED)
    monkeypatch.setattr(command, "OPERATIONS", OPERATIONS)
    return cupy


@pytest.mark.parametrize("suite", ["decode", "paged"])
def test_a_run_of_the_benchmark(suite, bench, monkeypatch, tmp_path, capsys):
    shapes, handed = suites.SUITES[suite], []
    monkeypatch.setattr(
        peer_process, "measure", lambda systems, shapes: handed.append([one.name for one in shapes]) or ({}, {})
    )
    path = tmp_path / "record.json"
    assert cli.main(["bench", "--suite", suite, "--json", str(path), "--peers", "torch"]) == 0
    assert handed == [[shape.name for shape in shapes]]
    report = Report.of(json.loads(path.read_text(encoding="utf-8")))
    assert [row.shape for row in report.rows] == list(shapes) and not report.wrong
    for row in report.rows:
        assert row.us == row.limit_us == 250.0 and row.fp16_us == 250.0 and row.host_us == 7.5
        assert row.kv_bytes == row.shape.kv_bytes and row.error > 1e-5
    printed = capsys.readouterr().out
    assert all(shape.name in printed for shape in shapes) and "emulated" in printed


def test_a_run_of_suite_cache(bench, tmp_path, capsys):
    path = tmp_path / "record.json"
    assert cli.main(["bench", "--suite", "cache", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    report = Report.of(json.loads(path.read_text(encoding="utf-8")))
    assert [(row.name, row.what) for row in report.rows] == [(one.name, one.what) for one in OPERATIONS]
    for row, one in zip(report.rows, OPERATIONS, strict=True):
        assert row.us == row.limit_us == 250.0 and row.host_us == 7.5
        assert row.nbytes == one.read_bytes + one.written_bytes
        assert row.limit_by.partition("[")[0] == ("cudaMemcpyAsync" if one.written_bytes else "read_limit")
        assert row.error == 0 if one.tolerance == 0 else 1e-6 < row.error <= one.tolerance
        assert row.times_faster == (1.0 if one.against else None) and row.name in printed


@pytest.mark.parametrize("one", OPERATIONS, ids=lambda one: one.name)
@pytest.mark.parametrize("sets", [1, 2, 11])
def test_the_result_of_an_operation_is_judged(one, sets, bench, monkeypatch):
    """An error is that of the last set, which no other set writes."""
    prepared = one.prepare(inputs.Filler(), sets)
    if one.tolerance == 0 and not isinstance(one, Gather):
        assert prepared.error() > 0.3, "before the call nothing is where it should be"
        for s in range(sets - 1):
            prepared.call(s)
        assert prepared.error() > 0.3, "the other sets write elsewhere"
    prepared.call(sets - 1)
    assert prepared.error() <= one.tolerance


@pytest.mark.parametrize(
    ("module", "name", "shapes"),
    [
        (operations, "gather", "gather"),
        (operations, "merge_state", "merge_state"),
        (operations, "merge_states", "merge_states"),
        (shared_prefix, "batch_decode_with_paged_kv_cache", "prefix.copies"),
    ],
)
def test_a_wrong_operation_fails_the_run(module, name, shapes, bench, monkeypatch):
    right = getattr(module, name)

    def wrong(*arguments, **options):
        found = right(*arguments, **options)
        for array in found if isinstance(found, tuple) else (found,):
            array[-1, -1] = 0
        return found

    monkeypatch.setattr(module, name, wrong)
    assert cli.main(["bench", "--suite", "cache", "--shapes", shapes]) == 1


def test_a_wrong_kernel_fails_the_run(bench, monkeypatch):
    right = inputs.decode.batch_decode_with_padded_kv_cache

    def wrong(*arguments, out, **options):
        right(*arguments, out=out, **options)
        out *= 1.01

    monkeypatch.setattr(inputs.decode, "batch_decode_with_padded_kv_cache", wrong)
    assert cli.main(["bench", "--shapes", "plain", "--quick"]) == 1


@pytest.mark.skipif(not hasattr(cupy_fp8kv, "DecodePlan"), reason="there are no plans")
def test_a_plan_is_measured_beside_the_call(bench):
    for shape in (*SHAPES, *PAGED):
        row = measure.measure(shape, inputs.Filler(), limit.ReadLimit(), fp16=False)
        assert row.plan_us == 250.0 and row.plan_host_us == 7.5 and not row.wrong


def test_what_does_not_fit_is_named(bench, monkeypatch, capsys):
    real = inputs.Filler.cache

    def cache(self, shape, fmt, place):
        if fmt.name == "f16":
            raise MemoryError("out of memory")
        return real(self, shape, fmt, place)

    monkeypatch.setattr(inputs.Filler, "cache", cache)
    row = measure.measure(SHAPES[0], inputs.Filler(), limit.ReadLimit(), fp16=True)
    assert row.fp16_us is None, "a comparison that does not fit is left out"
    assert cli.main(["bench", "--shapes", "mixed", "--peers", "none"]) == 1
    assert "mixed does not fit into the device's memory: out of memory" in capsys.readouterr().err


def test_the_limit_reads_every_byte_and_no_other(bench, emulate):
    """The read kernel over the pieces of a ragged batch: a byte past them may not be touched."""
    sets = inputs.InputSets.of(SHAPES[1], inputs.Filler(), 2)
    readable = []
    for caches, pieces in zip(sets.caches, sets.pieces, strict=True):
        for cache, piece in zip(caches, pieces, strict=True):
            may = np.zeros(cache.size, bool)
            may[: piece.size] = True
            readable.append((cache, may.reshape(cache.shape)))
    with emulate.watching(*readable):
        assert limit.ReadLimit().measure(sets.pieces).nbytes == SHAPES[1].kv_bytes
    readable[0][1][...] = False
    with emulate.watching(*readable), pytest.raises(RuntimeError, match="read"):
        limit.ReadLimit().measure(sets.pieces)


@pytest.mark.parametrize("shape", PAGED, ids=lambda shape: shape.name)
def test_the_limit_reads_as_many_bytes_of_the_pages_in_their_order(shape, bench, emulate):
    sets = inputs.InputSets.of(shape, inputs.Filler(), 2)
    order = sets.tables[1]
    assert sorted(order) == list(range(shape.cache_shape[0])) != list(order)
    pages = sets.pages
    readable = []
    for k, v in sets.caches:
        for cache in (k, v):
            row = shape.num_kv_heads * shape.head_dim * cache.itemsize
            may = np.zeros((len(cache), cache[0].nbytes), bool)
            for place, page in enumerate(order):
                may[page, : max(0, sum(shape.lengths) * row - place * cache[0].nbytes)] = True
            assert may.sum() == sum(shape.lengths) * row
            readable.append((cache.reshape(len(cache), -1).view(np.uint8), may))
    with emulate.watching(*readable):
        limit.ReadLimit().measure(sets.pieces, pages)


def test_shapes_are_copied_with_their_lengths():
    wide = dataclasses.replace(SHAPES[1], k="f16", v="f16")
    assert wide.kv_bytes == 2 * SHAPES[1].kv_bytes == 2 * 2 * (1 + 96 + 33) * 2 * 32
