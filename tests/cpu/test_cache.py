"""PagedKVCache: it reads what was appended, whoever shares pages; in NumPy, in torch and over the kernels' text."""

import subprocess
import sys

import emulator
import numpy as np
import pytest
from cache_model import HEADS, KINDS, LAYERS, D, Model, life
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_append import to_host
from test_arrays import TO, bits, kind

import cupy_fp8kv
from cupy_fp8kv import OutOfPagesError, PagedKVCache, cache_storage
from cupy_fp8kv.formats import KV_FORMATS


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_numpy(options):
    model = life(Model(options, device="cpu"))
    assert "numpy on host: 4 requests" in repr(model.cache)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_torch(options):
    torch = pytest.importorskip("torch")
    model = life(Model(options, TO["torch"], to_host, device=torch.device("cpu")))
    assert isinstance(model.cache.decode(0, torch.zeros(4, 4, D, dtype=torch.float16)), torch.Tensor)
    assert all(kind(table) == "torch" for table in model.cache.page_tables())


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_kernels(emulate, monkeypatch, options):
    from emulator.checks import move

    monkeypatch.setattr(cache_storage, "resolve_device", lambda device, library: (emulator.library, 0))
    life(Model(options, move, np.asarray))
    # A page table is sent once for a step, whatever the number of layers; a copy on write is one launch or two.
    assert any("append" in name for name, _ in emulate.launches) and any("copy" in name for name, _ in emulate.launches)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_order_of_operations(data):
    """Appends to all layers, forks and frees at random; running out of pages changes nothing."""
    model = Model({"format": "f16"}, num_pages=8, page_size=data.draw(st.integers(1, 4)), device="cpu")
    model.allocate(0)
    for new in range(1, data.draw(st.integers(2, 14))):
        names = list(model.rows)
        chosen = data.draw(st.sampled_from(names)) if names else None
        action = data.draw(st.sampled_from(["fork", "append", "append", "append", "free", "allocate"]))
        if action == "allocate" or chosen is None:
            model.allocate(new)
        elif action == "fork":
            model.fork(chosen, new)
        elif action == "free":
            model.free(chosen)
        else:
            counts = {name: data.draw(st.integers(1, 3)) for name in {chosen, names[0]}}
            before = {name: [list(rows) for rows in layers] for name, layers in model.rows.items()}
            try:
                for layer in range(LAYERS):
                    model.append(layer, counts)
            except OutOfPagesError:
                model.rows = before
        model.check(tolerance=5e-3)


def test_out_of_pages_changes_nothing():
    model = Model({}, num_pages=4, device="cpu")
    model.allocate("a")
    model.append(0, {"a": 9})
    model.append(1, {"a": 9})
    before = model.cache.pages(0).copy(), model.cache.allocator.version, repr(model.cache)
    with pytest.raises(OutOfPagesError, match=r"^2 pages are needed \(2 new, 0 to copy .*, and 1 of 4 are free"):
        model.append(0, {"a": 10})
    model.fork("a", "b")
    model.fork("a", "c")
    with pytest.raises(OutOfPagesError, match=r"2 pages are needed \(0 new, 2 to copy"):
        model.append(0, {"a": 1, "b": 1, "c": 1})
    model.free("b")
    model.free("c")
    assert (model.cache.pages(0) == before[0]).all() and repr(model.cache) == before[2]
    model.check()
    model.append(0, {"a": 7})


def test_errors_change_nothing():
    cache = PagedKVCache(LAYERS, 4, 4, HEADS, D, device="cpu")
    cache.allocate("a")
    x = np.ones((3, HEADS, D), np.float16)
    bad = [
        (TypeError, r"^append_key: expected float16.*got float64", (0, "a", x.astype(float), x)),
        (ValueError, r"^append_value: expected nnz = 3", (0, "a", x, x[:2])),
        (ValueError, r"^append_key: expected num_kv_heads = 2", (0, "a", np.ones((3, 1, D), np.float16), x)),
        (ValueError, r"^layer: expected a number from 0 to 1, got 2", (2, "a", x, x)),
        (TypeError, r"^layer: expected an integer, got 'a'", ("a", "a", x, x)),
        (KeyError, r"request: 'b' is not allocated", (0, "b", x, x)),
        (ValueError, r"^counts: .* each of 1 requests, 3 in all, got \[1\]", (0, ["a"], x, x)),
        (ValueError, r"^requests: expected each once", (0, ["a", "a"], x, x, [1, 2])),
        (TypeError, r"^append_key: expected an array of numpy like the cache, got one of torch",
         (0, "a", TO["torch"](x), TO["torch"](x))),
    ]  # fmt: skip
    for error, message, arguments in bad:
        with pytest.raises(error, match=message):
            cache.append(*arguments)
        assert cache.allocator.num_free == 4 and cache.length("a") == 0
    with pytest.raises(KeyError, match=r"request: 'b' is not allocated"):
        cache.decode(0, x, ["b"])
    with pytest.raises(ValueError, match=r"^q: "):
        cache.decode(0, np.ones((2, HEADS, D), np.float16))
    with pytest.raises(ValueError, match=r"^request: 'a' is allocated already"):
        cache.allocate("a")


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"num_pages": 0}, ValueError, "^num_pages: expected a positive"),
    ({"head_dim": 24}, ValueError, "^head_dim: expected a multiple of 16"),
    ({"num_kv_heads": 0}, ValueError, "^num_kv_heads: expected a positive"),
    ({"format": "int8"}, ValueError, "^format: expected one of"),
    ({"format": ("e4m3",) * 3}, ValueError, r"^format: expected one format or a pair"),
    ({"scales": "head"}, ValueError, "^scales: expected numbers.*'token', got 'head'"),
    ({"scales": "token", "format": ("f16", "e4m3")}, ValueError, "^scales: 'token' is for FP8.*FP16"),
    ({"scales": np.ones(3, np.float32)}, ValueError, r"^scales: .*\[num_kv_heads\] = \[2\].*got shape \[3\]"),
    ({"scales": np.zeros(2, np.float32)}, ValueError, "^scales: expected positive"),
    ({"scales": (1.0, 2.0, 3.0)}, ValueError, "^scales: .*pair"),
    ({"kv_layout": "DHN"}, ValueError, "^kv_layout"),
    ({"device": "tpu"}, ValueError, "^device: expected 'cpu'"),
    ({"library": "jax"}, ValueError, "^library: expected one of numpy, cupy, torch, got 'jax'"),
    ({"library": "cupy"}, ValueError, "^library: cupy has no arrays on host"),
])  # fmt: skip
def test_errors_of_the_constructor(changes, error, message):
    sizes = {"num_layers": 1, "num_pages": 2, "page_size": 4, "num_kv_heads": HEADS, "head_dim": D, "device": "cpu"}
    with pytest.raises(error, match=message):
        PagedKVCache(**(sizes | changes))


def test_what_it_costs_and_how_it_looks():
    fp8, fp16 = (PagedKVCache(3, 10, 16, 8, 64, format=name, device="cpu") for name in ("e4m3", "f16"))
    assert fp8.nbytes == 2 * 3 * 10 * 16 * 8 * 64 and fp16.nbytes == 2 * fp8.nbytes
    token = PagedKVCache(3, 10, 16, 8, 64, scales="token", device="cpu")
    assert token.nbytes == fp8.nbytes + 2 * 4 * 3 * 10 * 16 * 8
    pair = PagedKVCache(3, 10, 16, 8, 64, format=("f16", "e5m2"), device="cpu")
    assert pair.nbytes == 3 * 10 * 16 * 8 * 64 * 3
    fp8.allocate("a")
    fp8.append(0, "a", *np.ones((2, 17, 8, 64), np.float16))
    fp8.fork("a", "b")
    assert repr(fp8) == (
        "PagedKVCache(3 layers, 8 heads of 64, E4M3FN, NHD, numpy on host: 2 requests, 2 of 10 pages of 16 tokens "
        "used, 2 shared, 0.5 MB)"
    )
    assert "K FP16, V E5M2" in repr(pair) and "a scale a row" in repr(token)
    assert "a" in fp8 and "z" not in fp8 and len(fp8) == 2 and fp8.length("b") == 17 and fp8.length("a", 1) == 0
    assert fp8.allocate() == 2 and fp8.fork("a") == 3


def test_counters_and_single_tokens():
    cache = PagedKVCache(1, 4, 4, HEADS, D, device="cpu")
    counters = cupy_fp8kv.AppendCounters(HEADS, cache.pages(0))
    cache.allocate("a")
    x = np.full((HEADS, D), 1000, np.float16)
    cache.append(0, "a", x, x, counters=counters)
    assert cache.length("a") == 1 and counters.saturated.tolist() == [HEADS * D] * 2
    k, v = cache.gather(0)
    assert k.shape == (1, 1, HEADS, D) and (k == 0x7E).all() and (v == 0x7E).all()


def test_page_tables_are_sent_once_for_all_layers():
    model = Model({}, device="cpu")
    model.allocate("a")
    tables = []
    for layer in range(LAYERS):
        model.append(layer, {"a": 5})
        tables.append(model.cache.page_tables(layer))
    assert all(one is other or np.shares_memory(one, other) for one, other in zip(*tables, strict=True))
    indptr, indices, last = tables[0]
    assert indptr.tolist() == [0, 2] and last.tolist() == [1] and indices.tolist() == [0, 1]
    assert indptr.dtype == indices.dtype == last.dtype == np.int32


# Files


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_saved_and_loaded(tmp_path, options):
    pytest.importorskip("safetensors")
    model = life(Model(options, device="cpu"))
    path = tmp_path / "cache.safetensors"
    model.cache.save(path)
    for num_pages in (None, 40):
        other = PagedKVCache.load(path, num_pages=num_pages, device="cpu")
        assert other.requests == model.cache.requests
        for layer in range(LAYERS):
            ours, theirs = (cache.gather(layer) for cache in (model.cache, other))
            assert [bits(x) for x in ours] == [bits(x) for x in theirs]
        again = Model(options, device="cpu")
        again.cache, again.rows = other, model.rows
        again.check()
    model.append(0, {"e": 1})
    assert PagedKVCache.load(path, device="cpu").length("e") == model.cache.length("e") - 1


def test_a_file_holds_pages_in_use_as_bytes(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    cache = PagedKVCache(2, 100, 4, HEADS, D, format="bf16", device="cpu")
    for name in ("a", 7):
        cache.allocate(name)
        cache.append(0, name, *np.ones((2, 5, HEADS, D), np.float32))
    cache.free("a")
    cache.save(tmp_path / "x")
    tensors = safetensors.load_file(tmp_path / "x")
    assert {name: (x.dtype, x.shape) for name, x in tensors.items()} == {
        "pages": (np.uint8, (2, 2, 2, 4, HEADS, 2 * D))
    }
    assert PagedKVCache.load(tmp_path / "x", num_pages=2, device="cpu").requests == (7,)
    with pytest.raises(ValueError, match=r"^num_pages: expected at least the 2 pages in use, got 1"):
        PagedKVCache.load(tmp_path / "x", num_pages=1, device="cpu")
    cache.allocate(("not", "json"))
    with pytest.raises(TypeError, match=r"^requests: expected names that are str or int"):
        cache.save(tmp_path / "y")
    safetensors.save_file(tensors, tmp_path / "z")
    with pytest.raises(ValueError, match=r"^path: expected a file that PagedKVCache\.save wrote"):
        PagedKVCache.load(tmp_path / "z", device="cpu")


def test_empty_caches_are_saved_too(tmp_path):
    pytest.importorskip("safetensors")
    cache = PagedKVCache(2, 3, 4, HEADS, D, device="cpu")
    cache.save(tmp_path / "x")
    cache.allocate("a")
    cache.save(tmp_path / "y")
    assert PagedKVCache.load(tmp_path / "x", device="cpu").requests == ()
    assert PagedKVCache.load(tmp_path / "y", device="cpu").length("a") == 0


def test_without_safetensors_it_is_said():
    script = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import cupy_fp8kv\n"
        "cache = cupy_fp8kv.PagedKVCache(1, 1, 1, 1, 16, device='cpu')\n"
        "for call in (lambda: cache.save('x'), lambda: cupy_fp8kv.PagedKVCache.load('x')):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.count('need safetensors: pip install "cupy_fp8kv[safetensors]"') == 2


def test_formats_are_what_users_say():
    for given_format in (KV_FORMATS["e5m2"].dtype, "float8_e5m2", KV_FORMATS["e5m2"]):
        assert "E5M2" in repr(PagedKVCache(1, 1, 1, 1, 16, format=given_format, device="cpu"))
