"""The benchmark's peers without a GPU: who is there, what they are told, and their processes."""

import dataclasses
import itertools
import json
import sys
import types

import numpy as np
import pytest

import cupy_fp8kv
from cupy_fp8kv.backends import reference
from cupy_fp8kv.bench import inputs, peer_process, peers
from cupy_fp8kv.bench.report import PeerFigure
from cupy_fp8kv.bench.suites import Shape
from cupy_fp8kv.formats import KV_FORMATS

SHAPE = Shape("gqa4.b2", 2, 64, 8, 2, 32)


# Peers: who is there


def test_peers_are_found_without_importing_them(monkeypatch):
    installed = {"torch", "flashinfer"}
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name if name in installed else None)
    before = set(sys.modules)
    assert [peer.name for peer in peers.chosen([])] == [
        "torch-fp16", "torch-upcast", "fi-cc", "fi-tc", "fi-tc-padded", "fi-xqa",
    ]  # fmt: skip
    assert [peer.name for peer in peers.chosen(["torch-u", "vllm", "fi-x"])] == ["torch-upcast", "fi-xqa"]
    assert peers.chosen(["none"]) == []
    assert set(sys.modules) == before
    installed.remove("torch")
    assert peers.chosen([]) == [], "all of them need torch"


def test_a_peer_tells_its_version():
    info = dataclasses.replace(peers.PEERS[0], distribution="numpy").info()
    assert info.version == f"numpy {np.__version__}" and info.family == "torch SDPA"
    assert dataclasses.replace(peers.PEERS[0], distribution="absent-x").info().version == "absent-x of unknown version"


# Peers: what they are given. Stand-ins with the peers' names and arguments compute from what they were told.


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def paged_attention(torch, q, caches, table, lengths, kv_layout="NHD"):
    """NumPy attention over pages."""
    k, v = (cache.view(torch.uint8).numpy() for cache in caches)
    if kv_layout == "HND":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    page = k.shape[1]
    out = np.zeros(tuple(q.shape), np.float32)
    for request, length in enumerate(int(length) for length in lengths):
        pages = np.asarray(table[request])[: -(-length // page)]
        rows = [cache[pages].reshape(-1, *cache.shape[2:])[None, :length] for cache in (k, v)]
        formats = {"k_format": KV_FORMATS["e4m3"], "v_format": KV_FORMATS["e4m3"]}
        values = q[request].float().numpy()[None]
        out[request] = reference.attention(values, *rows, sm_scale=q.shape[-1] ** -0.5, **formats)[0][0]
    return torch.from_numpy(out).half()


def stand_ins(torch, monkeypatch):
    """Modules by the peers' names."""

    class Wrapper:
        def __init__(self, workspace, kv_layout, use_tensor_cores, backend):
            assert workspace.dtype is torch.uint8
            self.layout = kv_layout
            assert backend == ("fa2" if use_tensor_cores else "auto")

        def plan(
            self, indptr, indices, last, qo_heads, kv_heads, head_dim, page, q_data_type, kv_data_type, o_data_type
        ):
            assert (q_data_type, kv_data_type, o_data_type) == (torch.float16, torch.float8_e4m3fn, torch.float16)
            assert {one.dtype for one in (indptr, indices, last)} == {torch.int32}
            self.table = [indices[begin:end] for begin, end in itertools.pairwise(indptr)]
            self.lengths = [(len(pages) - 1) * page + rest for pages, rest in zip(self.table, last, strict=True)]
            self.facts = (qo_heads, kv_heads, head_dim, page)

        def run(self, q, caches):
            k = caches[0] if self.layout == "NHD" else caches[0].transpose(1, 2)
            assert self.facts == (q.shape[1], k.shape[2], k.shape[3], k.shape[1])
            return paged_attention(torch, q, caches, self.table, self.lengths, self.layout)

    def xqa(q, caches, workspace, table, lengths, most, bmm1_scale, bmm2_scale):
        assert lengths.dtype is torch.uint32 and most >= int(lengths.view(torch.int32).max()) and bmm2_scale == 1
        assert bmm1_scale == q.shape[-1] ** -0.5
        return paged_attention(torch, q, caches, table, lengths.view(torch.int32))

    def unified(q, k, v, out, cu_seqlens_q, seqused_k, max_seqlen_k, block_table, softmax_segm_output, **more):
        assert cu_seqlens_q.tolist() == list(range(len(q) + 1)) and max_seqlen_k == int(seqused_k.max())
        assert softmax_segm_output.shape[0] >= len(q) and more["softmax_scale"] == q.shape[-1] ** -0.5
        out.copy_(paged_attention(torch, q, (k, v), block_table, seqused_k))

    def decode(q, k, v, out, lse, table, lengths, partial, splits, sm_scale, page, k_scale, v_scale):
        assert partial.shape == (*q.shape[:2], splits, q.shape[2] + 1) and page == k.shape[1]
        out.copy_(paged_attention(torch, q, (k, v), table, lengths))

    def varlen(q, k, v, seqused_k, block_table, **more):
        assert q.dtype is torch.float8_e4m3fn and more["scheduler_metadata"] == "scheduled" and more["fa_version"] == 3
        return paged_attention(torch, q, (k, v), block_table, seqused_k)

    def schedule(batch, q_len, most, qo_heads, kv_heads, head_dim, cache_seqlens, **more):
        assert q_len == 1 and len(cache_seqlens) == batch and more["page_size"] > 0
        return "scheduled"

    interface = types.SimpleNamespace(flash_attn_varlen_func=varlen, get_scheduler_metadata=schedule)
    mode = types.SimpleNamespace(FP8_PER_TENSOR=1)
    for name, members in {
        "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": Wrapper},
        "flashinfer.decode": {"xqa_batch_decode_with_kv_cache": xqa},
        "vllm": {}, "vllm.v1": {}, "vllm.v1.attention": {}, "vllm.v1.attention.ops": {},
        "vllm.v1.attention.ops.triton_unified_attention": {"unified_attention": unified},
        "vllm.v1.attention.ops.triton_decode_attention": {"decode_attention_fwd": decode},
        "vllm.v1.kv_cache_interface": {"KVQuantMode": mode},
        "vllm.vllm_flash_attn": {"flash_attn_interface": interface},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(members, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)


class HostLibrary:
    """What InputSets asks of the library, for NumPy arrays."""

    @staticmethod
    def to_numpy(array):
        return array


def input_sets(shape, monkeypatch):
    """Two sets in host memory."""
    monkeypatch.setattr(inputs, "cupy_library", lambda: HostLibrary)
    rng = np.random.default_rng(0)

    def values(dims, name):
        wide = rng.standard_normal(dims, np.float32)
        fmt = KV_FORMATS[name]
        return reference.encode(wide, fmt) if fmt.is_fp8 else wide.astype(fmt.dtype)

    qs = [values((shape.batch, shape.num_qo_heads, shape.head_dim), shape.q) for _ in range(2)]
    caches = [(values(shape.cache_shape, shape.k), values(shape.cache_shape, shape.v)) for _ in range(2)]
    lens = None if shape.kv_lens is None or shape.page_size else np.array(shape.kv_lens, np.int32)
    kind = inputs.PagedInputSets if shape.page_size else inputs.InputSets
    return kind(shape, qs, caches, qs, {}, lens)


def error_of(peer, shape, torch, monkeypatch):
    sets = input_sets(shape, monkeypatch)
    call = peer.prepare(peers.TorchInputs(torch, sets))
    return sets.error_of(call(1).float().numpy().reshape(shape.batch, shape.num_qo_heads, shape.head_dim))


RAGGED = dataclasses.replace(SHAPE, batch=5, kv_len=128, kv_lens=(1, 128, 33, 64, 127))
LARGE = Shape("mha.b40", 40, 64, 2, 2, 32)  # more requests than vLLM splits by itself
ONE_PAGE_A_REQUEST = ("fi-tc-padded", "fa3-padded")


@pytest.mark.parametrize("shape", [SHAPE, RAGGED, LARGE], ids=["full", "ragged", "large"])
@pytest.mark.parametrize("peer", [peer for peer in peers.PEERS if peer.module != "torch"], ids=lambda peer: peer.name)
def test_peers_are_given_the_same_problem(peer, shape, torch, monkeypatch):
    stand_ins(torch, monkeypatch)
    monkeypatch.setattr(peers, "_WORKSPACE_BYTES", 16)
    if peer.name == "vllm-split":
        shape = dataclasses.replace(shape, num_kv_heads=2, num_qo_heads=8)
        if shape.batch <= 64:
            with pytest.raises(peers.UnsupportedError):
                error_of(peer, shape, torch, monkeypatch)
            shape = dataclasses.replace(shape, batch=65, kv_lens=None)
    assert error_of(peer, shape, torch, monkeypatch) < (0.06 if peer.name.startswith("fa3") else 5e-4)


@pytest.mark.parametrize("shape", [SHAPE.in_pages(16), RAGGED.in_pages(32), RAGGED.in_pages(5)], ids=lambda s: s.name)
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_peers_have_the_same_pages(peer, shape, torch, monkeypatch):
    """The stand-ins compute from the pools, the page size and the table that a peer is told."""
    stand_ins(torch, monkeypatch)
    monkeypatch.setattr(peers, "_WORKSPACE_BYTES", 16)
    if peer.name == "vllm-split":
        shape = dataclasses.replace(shape, batch=65, num_kv_heads=2, num_qo_heads=8, kv_lens=None)
    refused = peer.module == "torch" or peer.name in ONE_PAGE_A_REQUEST
    if refused or (peer.name == "fi-xqa" and shape.page_size == 5):
        with pytest.raises(peers.UnsupportedError, match=r"no pages|a page a request|pages of 16, 32, 64, 128 rows"):
            error_of(peer, shape, torch, monkeypatch)
    else:
        assert error_of(peer, shape, torch, monkeypatch) < (0.06 if peer.name.startswith("fa3") else 5e-4)


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_flashinfer_has_hnd_pages_too(peer, torch, monkeypatch):
    stand_ins(torch, monkeypatch)
    monkeypatch.setattr(peers, "_WORKSPACE_BYTES", 16)
    if peer.name in ("fi-cc", "fi-tc"):
        assert error_of(peer, RAGGED.in_pages(16, "HND"), torch, monkeypatch) < 5e-4
    else:
        with pytest.raises(peers.UnsupportedError):
            error_of(peer, RAGGED.in_pages(16, "HND"), torch, monkeypatch)


@pytest.mark.parametrize(
    "changed", [{"k": "f16"}, {"q": "bf16"}, {"kv_layout": "HND"}, {"head_scales": True}, {"v": "e5m2"}]
)
@pytest.mark.parametrize("peer", [peer for peer in peers.PEERS if peer.module != "torch"], ids=lambda peer: peer.name)
def test_peers_are_not_given_another_problem(peer, changed, torch, monkeypatch):
    stand_ins(torch, monkeypatch)
    with pytest.raises(peers.UnsupportedError):
        error_of(peer, dataclasses.replace(SHAPE, **changed), torch, monkeypatch)


@pytest.mark.parametrize(
    "changed", [{}, {"k": "f16"}, {"k": "e5m2", "v": "bf16"}, {"kv_layout": "HND"}, {"num_qo_heads": 2}]
)
@pytest.mark.parametrize("peer", peers.PEERS[:2], ids=lambda peer: peer.name)
def test_torch_attends_over_the_same_values(peer, changed, torch, monkeypatch):
    assert error_of(peer, dataclasses.replace(SHAPE, **changed), torch, monkeypatch) < 2e-3
    for refused in ({"head_scales": True}, {"kv_lens": (3, 64)}):
        with pytest.raises(peers.UnsupportedError):
            error_of(peer, dataclasses.replace(SHAPE, **refused), torch, monkeypatch)


def test_a_page_table_is_shuffled_but_for_a_last_part(torch, monkeypatch):
    shape = dataclasses.replace(RAGGED, kv_len=1024, kv_lens=(1000, 1024, 16, 1, 500))
    pages = peers.Pages(peers.TorchInputs(torch, input_sets(shape, monkeypatch)), 16)
    for request, length in enumerate(shape.kv_lens):
        used = pages.host_table[request][: -(-length // 16)]
        assert sorted(used) == list(range(request * 64, request * 64 + len(used)))
        if length % 16:
            assert used[-1] == request * 64 + len(used) - 1
        assert len(used) < 3 or list(used) != sorted(used)


def test_only_rows_that_count_are_judged(monkeypatch):
    sets = input_sets(dataclasses.replace(RAGGED, kv_lens=(7, 3, 100, 128, 9)), monkeypatch)
    formats = {"k_format": KV_FORMATS["e4m3"], "v_format": KV_FORMATS["e4m3"]}
    k, v = sets.caches[-1]
    right = reference.attention(sets.qs[-1], k, v, sm_scale=32**-0.5, kv_lens=sets.kv_lens, **formats)[0]
    assert sets.error_of(right) < 1e-6
    for request, judged in enumerate((False, True, False, True, True)):  # the shortest, the longest, and the last
        wrong = right.copy()
        wrong[request] *= 1.1
        assert (sets.error_of(wrong) > 0.05) == judged
    for piece, whole in zip(sets.pieces[0], sets.caches[0], strict=True):
        assert piece.nbytes == (7 + 3 + 100 + 128 + 9) * 2 * 32 and np.shares_memory(piece, whole)
    assert sum(piece.nbytes for piece in sets.pieces[1]) == sets.shape.kv_bytes


@pytest.mark.parametrize("shape", [SHAPE, RAGGED, dataclasses.replace(RAGGED, k="f16", kv_layout="HND")], ids=str)
def test_one_plan_serves_all_sets(shape, monkeypatch):
    """A stand-in for the plan: what it is made from, told, and run with."""
    sets, seen = input_sets(shape, monkeypatch), []

    class Plan:
        def __init__(self, q, k, v, kv_layout, **options):
            assert (
                q is sets.qs[0] and k is sets.caches[0][0] and v is sets.caches[0][1] and kv_layout == shape.kv_layout
            )
            assert options.pop("ragged") == (shape.kv_lens is not None)
            assert options == ({} if shape.k == "e4m3" else {"kv_format": ("f16", "e4m3")})

        def schedule(self, kv_lens):
            seen.append(kv_lens)

        def run(self, q, k, v, *, out):
            seen.append((q, k, v, out))

    monkeypatch.setattr(cupy_fp8kv, "DecodePlan", Plan, raising=False)
    run = sets.plan_call()
    if shape.kv_lens:
        assert seen.pop() is sets.kv_lens
    run(1)
    assert len(seen) == 1 and all(
        a is b for a, b in zip(seen[0], (sets.qs[1], *sets.caches[1], sets.outs[1]), strict=True)
    )


def test_without_plans_there_is_no_call(monkeypatch):
    monkeypatch.delattr(cupy_fp8kv, "DecodePlan", raising=False)
    monkeypatch.delitem(cupy_fp8kv._MODULE_OF, "DecodePlan")
    assert input_sets(SHAPE, monkeypatch).plan_call() is None


# Peers: their processes


def fake_child(monkeypatch, body):
    """A peer's process is a script: ``shapes`` are the names it is given, ``tell`` writes a line."""
    script = (
        "import json, os, sys, time\n"
        "shapes = [shape['name'] for shape in json.load(sys.stdin)]\n"
        "def tell(**record):\n"
        "    with open(sys.argv[1], 'a') as file: file.write(json.dumps(record) + '\\n')\n"
    )
    monkeypatch.setattr(peer_process, "_command", lambda peer, path: [sys.executable, "-c", script + body, str(path)])


SHAPES = [dataclasses.replace(SHAPE, name=name) for name in "abcd"]


def test_a_crash_costs_one_figure(monkeypatch):
    fake_child(monkeypatch, "for s in shapes:\n    if s == 'b': os.abort()\n    tell(shape=s, us=1.5, error=0.1)\n")
    found = peer_process.measure_one(peers.PEERS[0], SHAPES)
    assert {name: figure.us for name, figure in found.items()} == {"a": 1.5, "b": None, "c": 1.5, "d": 1.5}
    assert "ended with code -6" in found["b"].reason and not found["b"].skipped


def test_a_broken_context_costs_no_other_figure(monkeypatch):
    fake_child(
        monkeypatch,
        "for s in shapes:\n"
        "    tell(shape=s, us=None if s == 'b' else 1.5, reason='broke')\n"
        "    if s == 'b': sys.exit(3)\n",
    )
    found = peer_process.measure_one(peers.PEERS[0], SHAPES)
    assert {name: figure.us for name, figure in found.items()} == {"a": 1.5, "b": None, "c": 1.5, "d": 1.5}


def test_a_process_that_hangs_or_tells_nothing_is_ended(monkeypatch):
    monkeypatch.setattr(peer_process, "_MOST_SECONDS", 0.5)
    fake_child(monkeypatch, "time.sleep(60)\n")
    found = peer_process.measure_one(peers.PEERS[0], SHAPES[:2])
    assert all("took longer" in figure.reason for figure in found.values()) and list(found) == ["a", "b"]
    monkeypatch.setattr(peer_process, "_MOST_SECONDS", 30)
    fake_child(monkeypatch, "pass\n")
    assert peer_process.measure_one(peers.PEERS[0], SHAPES[:1])["a"].reason == "its process told nothing"
    fake_child(monkeypatch, "raise SystemExit('no such symbol')\n")
    assert "no such symbol" in peer_process.measure_one(peers.PEERS[0], SHAPES[:1])["a"].reason


def test_a_peer_that_cannot_be_imported_is_left_out(monkeypatch, capsys):
    fake_child(monkeypatch, "tell(unavailable='No module named xyz')\n")
    assert peer_process.measure(peers.PEERS[:1], SHAPES) == ({}, {})
    assert "without torch-fp16: No module named xyz" in capsys.readouterr().err


def test_the_real_child_says_what_is_missing(torch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert peer_process.measure_one(peers.PEERS[0], SHAPES[:1]) == "this torch has no CUDA"


def test_the_child_measures_each_shape(torch, monkeypatch, tmp_path):
    """The child's own loop, on host memory and without a clock."""
    calls = []

    def timed(cupy, call, sets, set_bytes, **more):
        calls.append(sets)
        return types.SimpleNamespace(us=2.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(peer_process, "Filler", lambda: None)
    monkeypatch.setattr(peer_process, "require_cupy", lambda: types.SimpleNamespace(
        get_default_memory_pool=lambda: types.SimpleNamespace(free_all_blocks=lambda: None)
    ))  # fmt: skip
    monkeypatch.setattr(
        peer_process, "InputSets", types.SimpleNamespace(of=lambda shape, filler: input_sets(shape, monkeypatch))
    )
    monkeypatch.setattr(peer_process, "time_calls", timed)
    monkeypatch.setattr(peer_process, "host_us", lambda *a, **k: 11.0)

    def prepare(given):
        if given.shape.name == "c":
            raise RuntimeError("out of luck\nand more")
        right = peers.PEERS[1].prepare(given)
        return (lambda s: right(s) * 1.2) if given.shape.name == "d" else right

    shapes = [SHAPES[0], dataclasses.replace(SHAPES[1], head_scales=True), *SHAPES[2:]]
    path = tmp_path / "told"
    assert peer_process.child(dataclasses.replace(peers.PEERS[1], prepare=prepare), shapes, path) == 0
    told = [json.loads(line) for line in path.read_text().splitlines()]
    found = {one.pop("shape"): PeerFigure(**one) for one in told}
    assert found["a"].us == 2.0 and found["a"].host_us == 11.0 and found["a"].error < 2e-3 and calls == [2]
    assert found["b"].skipped and found["c"].reason == "RuntimeError: out of luck"
    assert found["d"].us is None and "wrong result" in found["d"].reason and found["d"].error > 0.1


def test_shapes_reach_a_process_unchanged():
    shapes = [SHAPE, RAGGED, RAGGED.in_pages(5, "HND")]
    sent = json.loads(json.dumps([dataclasses.asdict(shape) for shape in shapes]))
    assert peers.shapes_of(sent) == shapes
