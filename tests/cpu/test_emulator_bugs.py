"""Planted bugs: each is noticed by the modes of the emulator that its line names.

``plain`` notices what a wrong result, a read of K or V through a load, or mismatched threads give away. What changes no
result is left to AddressSanitizer and UBSan (``address``: any access out of place) and ThreadSanitizer (``thread``: two
threads at one place without an order).
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass

import emulator
import numpy as np
import pytest
from cases import Case
from emulator.bugs import ADDRESS, MODE, PLAIN, THREAD, Bug, each_of_this_mode, noticed
from emulator.checks import SPLIT, TAIL, made_list, move, run
from listed import HUGE_AND_SMALL, NAMED, lists_everywhere
from rings import take_ring

import cupy_fp8kv
from cupy_fp8kv.backends import cuda, reference
from cupy_fp8kv.jit import sources
from cupy_fp8kv.plan import plan_decode

BF16_CACHE = dataclasses.replace(TAIL, k="bf16", v="bf16")
BF16_QUERY = dataclasses.replace(TAIL, q="bf16")
CAPPED = dataclasses.replace(TAIL, soft_cap=5.0, sharpness=3.0)
WINDOWED = dataclasses.replace(TAIL, window_left=20)
SCALED = dataclasses.replace(TAIL, scales="head")
LONG = dataclasses.replace(TAIL, kv_len=900, lens=(900, 500), sharpness=20.0)
NATURAL = dataclasses.replace(TAIL, lse_base="e")
WIDE = dataclasses.replace(TAIL, head_dim=256)
RINGED = dataclasses.replace(TAIL, kv_len=700, batch=1, lens=(690,), view="contiguous", seed=6)


def quantize(granularity):
    """A check of ``cupy_fp8kv.quantize`` for scales of this granularity."""

    def check(machine):
        x = np.random.default_rng(0).standard_normal((2, 9, 3, 48), np.float32)
        codes, scale = cupy_fp8kv.quantize(move(x), granularity=granularity)
        want = reference.amax_scale(x, cupy_fp8kv.KV_FORMATS["e4m3"], granularity)
        assert np.array_equal(scale, want)
        assert np.array_equal(np.asarray(codes).view(np.uint8), reference.quantize(x, codes_format, want))

    codes_format = cupy_fp8kv.KV_FORMATS["e4m3"]
    return check


def narrow(machine):
    """A split call in CTAs of two warps: few enough threads for TSan to know races between CTAs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "plan_decode", lambda problem, device: narrowed(plan_decode(problem, device)))
        run(machine, dataclasses.replace(SPLIT, kv_len=100, group=2))


def narrowed(plan):
    heads = plan.grid // plan.splits * 2
    return dataclasses.replace(
        plan, splits=3, grid=plan.grid // plan.splits * 3, spec=dataclasses.replace(plan.spec, warps=2),
        workspace_out=heads * 3 * plan.spec.head_dim * 4, workspace_state=heads * 3 * 8,
    )  # fmt: skip


def lists(machine):
    """One long request among short ones, through a work list."""
    with pytest.MonkeyPatch.context() as patch, lists_everywhere(patch):
        run(machine, HUGE_AND_SMALL)


def many_merges(machine):
    """More heads of split requests than there are CTAs to merge them."""
    with pytest.MonkeyPatch.context() as patch, lists_everywhere(patch):
        patch.setattr(cuda, "_MERGES_PER_SM", 1)
        run(machine, NAMED["equal"])


def merges_of_many_parts(machine):
    """The same of more parts than a chunk, which threads share."""
    with pytest.MonkeyPatch.context() as patch, lists_everywhere(patch):
        patch.setattr(cuda, "_MERGES_PER_SM", 1)
        few = dataclasses.replace(emulator.HOPPER, sm_count=20)
        patch.setattr(cuda, "device_info", lambda index: few)
        run(machine, Case(group=8, num_kv_heads=4, batch=2, kv_len=2000, kv_lens="device", lens=(2000, 5), seed=4))


def list_of_lens(machine):
    """The list alone, held against its definition."""
    with pytest.MonkeyPatch.context() as patch, lists_everywhere(patch):
        made, want = made_list((20_000, 0, 7000, 63, 9000, 64, 128, 400), 20_000, window_left=15_000)
        assert made == want


def many_lists(machine):
    """More requests than a warp has lanes, and than one round of the scheduling CTA takes."""
    with pytest.MonkeyPatch.context() as patch, lists_everywhere(patch):
        patch.setattr(cuda.ScheduleSpec, "of_batch", lambda batch: cuda.ScheduleSpec(64))
        run(machine, dataclasses.replace(NAMED["many"], batch=150, lens=NAMED["many"].lens[-150:]))


def ring(machine):
    """Two heads through a ring, and several times round it."""
    with pytest.MonkeyPatch.context() as patch:
        take_ring(patch, RINGED, emulator.HOPPER)
        run(machine, RINGED)


BUGS = [
    # Wrong results
    Bug(
        "splits overlap", (PLAIN,), "decode.cu", "(Schedule::kManyWorks ? 1 : work.splits) * kTurnRows",
        "kTurnRows", SPLIT,
    ),
    Bug("a row too many", (PLAIN,), "mask.cuh", "return row < end &&", "return row <= end &&"),
    Bug("a window one short", (PLAIN,), "mask.cuh", "kv_len - 1 - window_left;", "kv_len - window_left;", WINDOWED),
    Bug(
        "slices in another order", (PLAIN,), "base/row_slice.cuh", "return LANES * start + lane", "return start + lane",
    ),
    Bug(
        "bytes paired wrongly", (PLAIN,), "kv_format/fp8.cuh", "j % 2 ? 0x7362 : 0x5140", "j % 2 ? 0x7362 : 0x4150",
    ),
    Bug("weights not transposed", (PLAIN,), "attention/columns.cuh", "ptx::transpose_8x8(terms[i])", "terms[i]"),
    Bug(
        "half an accumulator not rescaled", (PLAIN,), "attention/columns.cuh", "out[n][j][c + 2] *= factor;", "", LONG,
    ),
    Bug(
        "sums of some lanes only", (PLAIN,), "attention/columns.cuh", "mask = 4; mask < 32; mask *= 2) state",
        "mask = 8; mask < 32; mask *= 2) state",
    ),
    Bug(
        "a sum merged without its factor", (PLAIN,), "attention/parts.cuh", "given[i].state.sum, factor);",
        "given[i].state.sum, 1.0f);", SPLIT,
    ),
    Bug(
        "the wrong query heads", (PLAIN,), "attention/query_rows.cuh",
        "return {first, kv_head * p.columns + column};", "return {first, kv_head + column};",
    ),
    Bug("the wrong cache head", (PLAIN,), "layout/padded.cuh", "head * p.v_stride_head", "0 * p.v_stride_head"),
    Bug(
        "one term of a bf16 weight", (PLAIN,), "base/operand.cuh", "kWeightTerms = 2;", "kWeightTerms = 1;", BF16_CACHE,
    ),
    Bug(
        "the query's factor not undone", (PLAIN,), "attention/query.cuh", "return scale * inverses_",
        "return scale; scale * inverses_", BF16_QUERY,
    ),
    Bug("a soft cap of the wrong base", (PLAIN,), "decode.cu", "(p.soft_cap * kLog2E)", "(p.soft_cap)", CAPPED),
    Bug(
        "one scale for all heads", (PLAIN,), "scale/head.cuh", "scales[static_cast<i64>(head) * stride]", "scales[0]",
        SCALED,
    ),
    Bug(
        "the lse in the wrong unit", (PLAIN,), "decode.cu", "state.log2_sum() * p.lse_unit", "state.log2_sum()",
        NATURAL,
    ),
    Bug(
        "rows of another request", (PLAIN, ADDRESS), "schedule/uniform.cuh", "Layout::kv_len(p, work.request)",
        "Layout::kv_len(p, 0)",
    ),
    # Threads that do not come together
    Bug(
        "a vote of some lanes", (PLAIN,), "attention/columns.cuh", "if (ptx::any(exceeded))",
        "if (exceeded && ptx::any(exceeded))", said="lanes of a warp are at different operations",
    ),
    Bug(
        "lanes at different operations", (PLAIN,), "attention/columns.cuh", "if (ptx::any(exceeded))",
        "if (threadIdx.x % 2 && ptx::any(exceeded))", said="lanes of a warp are at different operations",
    ),
    Bug(
        "threads that wait for each other", (PLAIN,), "attention/columns.cuh", "if (ptx::any(exceeded))",
        "if (threadIdx.x >= 16) ptx::sync_threads();\n        if (ptx::any(exceeded))", said="deadlock",
    ),
    Bug(
        "a lane that leaves before its warp votes", (PLAIN,), "decode.cu", "    WarpColumns columns;\n",
        "    if (threadIdx.x == 5) return;\n    WarpColumns columns;\n", said="a lane has left the kernel",
    ),
    # Accesses out of place
    Bug(
        "a masked read past the end of a request", (PLAIN, ADDRESS), "mask.cuh", "return min_of(row, end - 1);",
        "return row;", WINDOWED,
    ),
    Bug(
        "a masked read before the window", (PLAIN, ADDRESS), "mask.cuh", "kv_len - 1 - window_left;",
        "max_of(0, kv_len - 2 - window_left);", WINDOWED,
    ),
    Bug(
        "a read past the end of a row", (PLAIN, ADDRESS), "base/row_slice.cuh", "return lane * load_width(0);",
        "return lane * load_width(0) + 16;", WINDOWED,
    ),
    Bug(
        "a misaligned read", (PLAIN,), "base/row_slice.cuh", "return lane * load_width(0);",
        "return lane * load_width(0) + 4;", said="a misaligned read",
    ),
    Bug(
        "results of columns without a head", (ADDRESS,), "decode.cu",
        "return max_of(0, min_of(kColumns, of_head - first));", "return kColumns;",
    ),
    Bug(
        "shared memory past its end", (ADDRESS,), "attention/query.cuh", "* kTerms + i) * 32]", "* kTerms + i) * 33]",
    ),
    Bug(
        "a static shared array too small", (ADDRESS,), "attention/parts.cuh", "SoftmaxState states[THREADS];",
        "SoftmaxState states[THREADS / 8];", SPLIT, "out of bounds for type 'SoftmaxState",
    ),
    Bug(
        "a partial result read that nobody uses", (ADDRESS,), "attention/parts.cuh",
        "if (first + i < parts.count) raw", "if (true) raw", SPLIT, "use-after-poison",
    ),
    Bug(
        "a scale too many", (ADDRESS,), "quantize.cu", "if (i < p.scale_count)", "if (i <= p.scale_count)",
        quantize("head"), "use-after-poison",
    ),
    Bug(
        "values read past the end of a row", (ADDRESS,), "quantize.cu", "d < p.head_dim; d += 128",
        "d <= p.head_dim; d += 128", quantize("tensor"), "use-after-poison",
    ),
    Bug(
        "codes written past the end", (ADDRESS,), "quantize.cu", "at < p.rows * quads; at += threads) {\n"
        "        const i64 row = at / quads;\n        const int quad = static_cast<int>(at % quads);\n"
        "        const RowIndex index = RowIndex::of(p, row);\n        const float4 x",
        "at <= p.rows * quads; at += threads) {\n"
        "        const i64 row = min_of(at, p.rows * quads - 1) / quads;\n"
        "        const int quad = static_cast<int>(at % quads);\n"
        "        const RowIndex index = RowIndex::of(p, row);\n        const float4 x",
        quantize("token"), "use-after-poison",
    ),
    # The ring
    Bug(
        "a box that is not waited for", (PLAIN, THREAD), "attention/ring.cuh",
        "        ptx::barrier_wait(filled(turn.stage), turn.parity);\n", "", ring,
    ),
    Bug(
        "a box filled without waiting", (PLAIN,), "attention/ring.cuh", "if (!first) ptx::barrier_wait",
        "if (false) ptx::barrier_wait", ring, "more arrivals at a barrier than it counts",
    ),
    Bug(
        "a box filled while a warp reads it", (THREAD,), "attention/ring.cuh", "(free(s), WARPS)",
        "(free(s), WARPS - 1)", ring,
    ),
    Bug(
        "a warp that never comes", (PLAIN,), "attention/ring.cuh", "(free(s), WARPS)", "(free(s), WARPS + 1)", ring,
        "deadlock",
    ),
    Bug(
        "bytes that never come", (PLAIN,), "attention/ring.cuh", "(filled(turn.stage), bytes)",
        "(filled(turn.stage), bytes + 16)", ring, "deadlock",
    ),
    Bug(
        "chunks exchanged otherwise", (PLAIN,), "attention/ring.cuh", "kPieceBytes == 128 ? 7",
        "kPieceBytes == 128 ? 3", ring,
    ),
    Bug("the neighbour's rows", (PLAIN,), "attention/ring.cuh", "head * ROW_BYTES + begin", "begin", ring),
    Bug("a stage too many", (PLAIN,), "attention/ring.cuh", "++turn.stage == count_", "++turn.stage > count_", ring),
    # Work lists
    Bug(
        "a part too few", (PLAIN,), "schedule.cu", "(turns - slack - 1) / chunk + 1;", "(turns - slack - 1) / chunk;",
        list_of_lens,
    ),
    Bug(
        "smallest parts first", (PLAIN,), "schedule.cu", "max_of(0, kBuckets - 1 - static_cast<int>(",
        "max_of(0, (kBuckets - 1) & static_cast<int>(", list_of_lens,
    ),
    Bug(
        "rows before a window counted", (PLAIN,), "schedule.cu", "range.end - range.begin + p", "range.end + p",
        list_of_lens,
    ),
    Bug("parts of one number", (PLAIN,), "schedule.cu", "count << 16 | i,", "count << 16,", lists),
    Bug("slots that two parts share", (PLAIN,), "schedule.cu", "first_slot + static_cast<int>(i)", "first_slot", lists),
    Bug(
        "many parts of one request forgotten", (PLAIN,), "schedule.cu", "ptx::ballot(parts > kOwn)",
        "ptx::ballot(parts > 2 * kOwn)", list_of_lens,
    ),
    Bug(
        "entries of a bucket at one place", (PLAIN,), "schedule.cu", "if (lane == bucket) entries +=",
        "if (lane == bucket) entries =", lists,
    ),
    Bug(
        "an earlier warp's entries overwritten", (PLAIN,), "schedule.cu", "entries - of_bucket + of_earlier,",
        "entries - of_bucket,", many_lists,
    ),
    Bug(
        "an earlier round's entries overwritten", (PLAIN,), "schedule.cu",
        "before = tally.take(item, lane);\n        }", "before = Tally(tally).take(item, lane);\n        }", many_lists,
    ),
    Bug(
        "nothing to do, done all the same", (PLAIN, ADDRESS), "schedule/listed.cuh",
        "exists ? static_cast<int>(entry.parts_and_split >> 16) : 0", "static_cast<int>(entry.parts_and_split >> 16)",
        lists,
    ),
    Bug(
        "a merge of a request that was not split", (PLAIN, ADDRESS), "schedule/listed.cuh",
        "exists ? split.parts : Parts::kNoMore", "exists ? split.parts : 2", lists,
    ),
    Bug(
        "a list longer than its memory", (ADDRESS,), "schedule.cu", "if (threadIdx.x == 0) *list.head",
        "list.entries[p.batch + p.list_parts.value] = {};\n    if (threadIdx.x == 0) *list.head", list_of_lens,
        "use-after-poison",
    ),
    Bug(
        "no barrier before all turns are added up", (THREAD,), "schedule.cu",
        "    ptx::sync_threads();\n    const Cut", "    const Cut", many_lists,
    ),
    Bug(
        "all lanes write a warp's count", (THREAD,), "schedule.cu", "if (lane == 0) splits_of_warp", "splits_of_warp",
        many_lists,
    ),
    # Races
    Bug(
        "no barrier before combining", (PLAIN, THREAD), "attention/combine.cuh",
        "                ptx::sync_first<32 * WARPS>();\n                for (int task",
        "                for (int task",
    ),
    Bug(
        "no barrier after storing q", (PLAIN, THREAD), "attention/query.cuh",
        "        ptx::sync_first<32 * WARPS>();\n", "",
    ),
    Bug(
        "a warp's barrier for the CTA's", (THREAD,), "attention/query.cuh",
        "        ptx::sync_first<32 * WARPS>();\n",
        "        ptx::sync_warp();\n",
    ),
    Bug(
        "no barrier between pieces", (THREAD,), "attention/combine.cuh",
        "if (first_tile || begin) ptx::sync_first<32 * WARPS>();", "", WIDE,
    ),
    Bug(
        "no barrier in the merge", (THREAD,), "attention/parts.cuh",
        "            ptx::sync_first<THREADS>();\n            for (int other", "            for (int other", SPLIT,
    ),
    Bug(
        "no barrier between merges", (THREAD,), "merge.cu",
        "        ptx::sync_threads();  // shared memory is used again\n", "", merges_of_many_parts,
    ),
    Bug("a merge that stops early", (PLAIN,), "merge.cu", "index += gridDim.x", "index += most", many_merges),
    Bug(
        "one lse from several threads", (THREAD,), "decode.cu", "if (dim == 0 && p.lse)", "if (dim < 8 && p.lse)",
    ),
    Bug("one state from several lanes", (THREAD,), "attention/combine.cuh", "if (lane.group == 0)\n", "if (true)\n"),
    Bug(
        "results stored twice", (THREAD,), "attention/combine.cuh", "width * 4 * tiles; task += 32 * WARPS",
        "width * 4 * tiles; task += 4 * WARPS", dataclasses.replace(TAIL, group=8),
    ),
    Bug(
        "splits that store to one place", (PLAIN, THREAD), "schedule/uniform.cuh",
        "splits == 1, place.part,", "splits == 1, request,", narrow,
    ),
    Bug(
        "a maximum that is not atomic", (THREAD,), "quantize.cu", "ptx::atomic_max(&slots[slot], largest)",
        "slots[slot] = max_of(slots[slot], largest)", quantize("tensor"),
    ),
]  # fmt: skip


@each_of_this_mode(BUGS)
def test_planted_bugs_are_noticed(tmp_path, monkeypatch, machine, bug):
    said = noticed(tmp_path, monkeypatch, machine, bug)
    if MODE == THREAD:
        assert "ThreadSanitizer: data race" in said
    elif MODE == ADDRESS:
        assert "AddressSanitizer" in said or "runtime error" in said


@pytest.mark.parametrize(
    "check", dict.fromkeys(bug.check for bug in BUGS), ids=lambda check: getattr(check, "__name__", str(check))
)
def test_checks_of_planted_bugs_pass_without_them(emulate, check):
    run(emulate, check) if isinstance(check, Case) else check(emulate)


def test_planted_bugs_cover_the_modes():
    counts = Counter(mode for bug in BUGS for mode in bug.modes)
    assert len(BUGS) >= 25 and len({bug.name for bug in BUGS}) == len(BUGS)
    assert counts[PLAIN] >= 20 and counts[ADDRESS] >= 8 and counts[THREAD] >= 8
    # What no other mode notices.
    for mode in (ADDRESS, THREAD):
        assert sum(bug.modes == (mode,) for bug in BUGS) >= 5


# Kernels that exchange through shared memory within a warp, and publish with a fence: no kernel of cuda_src does so yet


@dataclass(frozen=True)
class TestKernel:
    """A kernel of the tests, in the form of a specialisation."""

    __test__ = False
    text: str
    threads: int = 64
    shared_bytes: int = 4 * 64
    entry = "kernel"

    def source(self):
        return sources.render("test kernel", [], [], "base/ptx.cuh") + PARAMS + self.text


PARAMS = "struct Params { u32* data; u32* flag; i64 count; };"

EXCHANGE = """
extern "C" __global__ void kernel(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) u8 shared[];
    u32* mine = reinterpret_cast<u32*>(shared) + threadIdx.x / 32 * 32;
    const int lane = threadIdx.x % 32;
    mine[lane] = threadIdx.x;
    ptx::sync_warp();
    p.data[threadIdx.x] = mine[lane ^ 1];
}
"""

# A CTA writes, then announces it; the last one to do so adds up what all have written.
PUBLISH = """
extern "C" __global__ void kernel(const __grid_constant__ Params p) {
    if (threadIdx.x) return;
    p.data[blockIdx.x] = blockIdx.x + 1;
    emulator::fence();
    emulator::publish(p.flag);
    const u32 before = __atomic_fetch_add(p.flag, 1u, __ATOMIC_RELAXED);
    emulator::fence();
    if (before + 1 < gridDim.x) return;
    u32 sum = 0;
    for (u32 i = 0; i < gridDim.x; i++) sum += p.data[i];
    p.data[0] = sum;
}
"""


def run_exchange(machine, text):
    data, flag = move(np.zeros(64, np.uint32)), move(np.zeros(1, np.uint32))
    machine.call(TestKernel(text), 1, data, flag, 0)
    assert np.array_equal(data, np.arange(64, dtype=np.uint32) ^ 1)


def run_publish(machine, text):
    data, flag = move(np.zeros(8, np.uint32)), move(np.zeros(1, np.uint32))
    machine.call(TestKernel(text, threads=32), 8, data, flag, 0)
    assert data[0] == 36 and flag[0] == 8


def test_warps_exchange_and_ctas_publish(emulate):
    run_exchange(emulate, EXCHANGE)
    run_publish(emulate, PUBLISH)


@pytest.mark.skipif(MODE != THREAD, reason="python tests/emulator thread")
@pytest.mark.parametrize(
    ("call", "text", "right", "wrong"),
    [
        (run_exchange, EXCHANGE, "    ptx::sync_warp();\n", ""),
        # Lanes meet, but a vote orders no memory.
        (run_exchange, EXCHANGE, "    ptx::sync_warp();\n", "    ptx::any(true);\n"),
        (run_publish, PUBLISH, "    emulator::fence();\n    emulator::publish", "    emulator::publish"),
        (run_publish, PUBLISH, "    emulator::fence();\n    if", "    if"),
    ],
    ids=["no sync_warp", "a vote for sync_warp", "no fence before publishing", "no fence after reading"],
)
def test_missing_order_within_a_warp_and_between_ctas(emulate, call, text, right, wrong):
    assert text.count(right) == 1
    with pytest.raises(RuntimeError, match="ThreadSanitizer: data race"):
        call(emulate, text.replace(right, wrong))
