"""The benchmark on a GPU: it measures what it says, ours and a peer's, and prints, saves and draws it."""

import dataclasses
import json
import os

import numpy as np
import pytest
from gpu_support import cp

from cupy_fp8kv import cli
from cupy_fp8kv.bench import command, measure, peer_process, peers, start
from cupy_fp8kv.bench.inputs import Filler, InputSets
from cupy_fp8kv.bench.limit import ReadLimit
from cupy_fp8kv.bench.operations import SOURCES, Append, CopyPages, Gather, Merge
from cupy_fp8kv.bench.report import Report
from cupy_fp8kv.bench.shared_prefix import SharedPrefix
from cupy_fp8kv.bench.suites import Shape

pytestmark = pytest.mark.gpu
SHAPE = Shape("gqa4.b4", 4, 512, 32, 8)
RAGGED = dataclasses.replace(SHAPE, name="ragged", kv_lens=(1, 512, 100, 333))
OPERATIONS = (
    *(Append(f"append.{source}.b4", 4, 1, source) for source in SOURCES),
    *(Append(f"append.{source}.l100", 1, 100, source) for source in SOURCES),
    CopyPages("copy_pages", 32),
    Gather("gather", 4, 100),
    Merge("merge_state", 16),
    Merge("merge_states", 16, 5),
    SharedPrefix("prefix.copies", "copies", "", 8, 512, 40),
    SharedPrefix("prefix.tables", "tables", "prefix.copies", 8, 512, 40),
    SharedPrefix("prefix.wrapper", "wrapper", "prefix.copies", 8, 512, 40),
)


@pytest.mark.parametrize(
    "changed",
    [
        {}, {"kv_lens": RAGGED.kv_lens}, {"kv_layout": "HND"}, {"head_scales": True}, {"k": "f16"}, {"q": "bf16"},
        {"num_qo_heads": 40}, {"kv_lens": RAGGED.kv_lens, "k": "bf16", "v": "bf16"},
        {"kv_lens": RAGGED.kv_lens, "kv_layout": "HND"},
    ],
    ids=str,
)  # fmt: skip
def test_a_shape_is_measured(changed):
    shape = dataclasses.replace(SHAPE, **changed)
    row = measure.measure(shape, Filler(), ReadLimit(), fp16=True)
    assert not row.wrong and row.kv_bytes == shape.kv_bytes
    assert all(0 < figure < 1000 for figure in (row.limit_us, row.us, row.host_us))
    assert row.us_low <= row.us <= row.us_high
    assert (row.fp16_us is None) == (shape.k == shape.v == "bf16")


@pytest.fixture(scope="module")
def filler():
    return Filler()


@pytest.mark.parametrize(
    ("page_size", "layout", "changed"),
    [
        (16, "NHD", {}), (64, "HND", {}), (1, "NHD", {"kv_lens": RAGGED.kv_lens}),
        (5, "HND", {"kv_lens": RAGGED.kv_lens}), (16, "NHD", {"k": "f16", "v": "e5m2"}),
    ],
    ids=str,
)  # fmt: skip
def test_a_shape_over_pages_is_measured(page_size, layout, changed, filler):
    shape = dataclasses.replace(SHAPE, **changed).in_pages(page_size, layout)
    row = measure.measure(shape, filler, ReadLimit(), fp16=True)
    assert not row.wrong and row.kv_bytes == shape.kv_bytes and " paged]" in row.limit_by
    assert all(0 < figure < 1000 for figure in (row.limit_us, row.us, row.host_us, row.fp16_us, row.plan_us))


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="to be timed, the GPU must not be shared")
def test_the_limit_of_pages_is_about_that_of_one_piece(filler):
    """Pages of 16 KB, in any order, are read about as fast as all in one piece: if not, the list is what takes long."""
    shape = Shape("gqa4.b16.l4k", 16, 4096, 32, 8)
    paged, padded = (InputSets.of(one, filler) for one in (shape.in_pages(16), shape))
    reader = ReadLimit()
    of_pages, of_pieces = reader.measure(paged.pieces, paged.pages), reader.measure(padded.pieces)
    assert of_pages.nbytes == of_pieces.nbytes and of_pieces.us * 0.8 < of_pages.us < of_pieces.us * 1.25


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_an_operation_is_measured(operation, filler):
    row = measure.measure_operation(operation, filler, ReadLimit())
    assert not row.wrong, f"error {row.error}"
    assert all(0 < figure < 1000 for figure in (row.limit_us, row.us, row.host_us)) and row.us_low <= row.us
    assert row.nbytes == operation.read_bytes + operation.written_bytes


def test_suite_cache_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "OPERATIONS", OPERATIONS)
    path = tmp_path / "record.json"
    assert cli.main(["bench", "--suite", "cache", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    report = Report.of(json.loads(path.read_text(encoding="utf-8")))
    assert [row.name for row in report.rows] == [operation.name for operation in OPERATIONS]
    assert all((row.times_faster is None) == (row.against == "") for row in report.rows)
    assert cli.main(["bench", "--from", str(path)]) == 0 and capsys.readouterr().out == printed


def test_the_pieces_of_a_ragged_batch_are_as_many_bytes():
    given = InputSets.of(RAGGED, Filler(), 2)
    for k, v in given.pieces:
        assert k.nbytes + v.nbytes == RAGGED.kv_bytes == 2 * sum(RAGGED.kv_lens) * 8 * 128
        assert k.flags.c_contiguous and v.flags.c_contiguous
    assert {k.data.ptr for k, _ in given.pieces} == {k.data.ptr for k, _ in given.caches}


def test_sets_hold_different_values():
    given = InputSets.of(SHAPE, Filler(), 3)
    arrays = [cp.asnumpy(array) for pair in given.caches for array in pair]
    assert all((one != other).mean() > 0.5 for i, one in enumerate(arrays) for other in arrays[:i])
    assert 0.9 < np.std(cp.asnumpy(given.qs[0]).astype(np.float32)) < 1.1


@pytest.mark.parametrize("name", ["torch-fp16", "torch-upcast"])
def test_torch_is_measured_beside_ours(name):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    peer = next(peer for peer in peers.PEERS if peer.name == name)
    infos, figures = peer_process.measure([peer], [SHAPE, RAGGED, SHAPE.in_pages(16)])
    found = figures[name][SHAPE.name]
    assert infos[name].version.split("+")[0] == f"torch {torch.__version__}".split("+")[0]
    assert found.reason == "" and 1 < found.us < 10_000 and found.host_us > 1 and found.error <= peer.tolerance
    assert figures[name][RAGGED.name].reason == "one length for all"
    assert figures[name][SHAPE.in_pages(16).name].reason == "no pages"


def test_the_first_result_is_timed():
    found = {one.name: one for one in start.run(processes=1)}
    assert list(found) == ["cold", "warm", "import"]
    assert found["import"].seconds < min(found["warm"].seconds, found["cold"].seconds)
    assert list(found["cold"].steps)[-2:] == ["first call", "result"]
    assert found["warm"].steps["first call"] < found["cold"].steps["first call"]


def test_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "record.json"
    arguments = ["bench", "--suite", "small", "--shapes", "gqa4.b1.l128", "--peers", "none", "--json", str(path)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    report = Report.of(json.loads(path.read_text(encoding="utf-8")))
    assert report.suite == "small" and [row.shape.name for row in report.rows] == ["gqa4.b1.l128"]
    assert report.machine["device"] in printed and f"{report.rows[0].us:.2f}" in printed
    assert cli.main(["bench", "--from", str(path)]) == 0 and capsys.readouterr().out == printed
