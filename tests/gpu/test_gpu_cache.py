"""PagedKVCache on the GPU: CuPy and torch, every kind of scale; tables are sent without waiting for the device."""

import numpy as np
import pytest
from cache_model import KINDS, Model, life
from gpu_support import cp, spin, to_cupy, to_host, warm_spin

from cupy_fp8kv import PagedKVCache

pytestmark = pytest.mark.gpu

EACH_KIND = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@EACH_KIND
def test_cupy(options):
    model = life(Model(options, to_cupy, to_host, device="cuda"))
    assert "cupy on cuda:0" in repr(model.cache)
    assert all(isinstance(table, cp.ndarray) for table in model.cache.page_tables())


@EACH_KIND
def test_torch(options):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    model = life(Model(options, lambda x: torch.from_numpy(x).cuda(), to_host, device=torch.device("cuda")))
    assert "torch on cuda:0" in repr(model.cache)
    assert all(table.is_cuda for table in model.cache.page_tables())


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_nothing_waits_for_the_device(library):
    """Steps, a fork and its copies return while the stream is still busy with what came before them."""
    if library == "torch":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("this torch has no CUDA")
    warm_spin()

    def move(x):
        return to_cupy(x) if library == "cupy" else torch.from_numpy(x).cuda()

    cache = PagedKVCache(2, 64, 16, 2, 64, device="cuda", library=library)
    x, q = move(np.ones((3, 2, 64), np.float16)), move(np.ones((3, 8, 64), np.float16))

    def steps(a, b, c):
        for request in (a, b):
            cache.allocate(request)
        cache.append(0, a, x, x)
        cache.append(0, b, x[:1], x[:1])
        cache.fork(a, c)
        cache.append(0, [a, b, c], x, x)
        return cache.decode(0, q, [a, b, c])

    def keep_busy():
        spin(100) if library == "cupy" else torch.cuda._sleep(300_000_000)

    first = steps(1, 2, 3)  # compiles
    current = cp.cuda.get_current_stream() if library == "cupy" else torch.cuda.current_stream()
    current.synchronize()
    keep_busy()
    steps(4, 5, 6)  # makes as much pinned memory as is in use at a time
    current.synchronize()
    keep_busy()
    again = steps(7, 8, 9)
    assert not (current.done if library == "cupy" else current.query()), "something waited"
    current.synchronize()
    np.testing.assert_array_equal(to_host(first), to_host(again))


def test_a_step_is_not_captured():
    """Refused before anything changes; a decode over tables that were sent before can be captured."""
    cache = PagedKVCache(1, 8, 16, 2, 64, device="cuda")
    cache.allocate("a")
    x, q = cp.ones((3, 2, 64), np.float16), cp.ones((1, 8, 64), np.float16)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        cache.append(0, "a", x, x)
        want = cache.decode(0, q)
        stream.synchronize()
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match=r"^PagedKVCache: expected no append.*while a graph is captured"):
                cache.append(0, "a", x, x)
            got = cache.decode(0, q)
        finally:
            graph = stream.end_capture()
        graph.launch()
    stream.synchronize()
    assert cache.length("a") == 3
    np.testing.assert_array_equal(to_host(got), to_host(want))


def test_saved_on_the_gpu_and_loaded_anywhere(tmp_path):
    pytest.importorskip("safetensors")
    model = life(Model(KINDS["layers"], to_cupy, to_host, device="cuda"))
    model.cache.save(tmp_path / "x")
    for device in ("cpu", "cuda"):
        other = PagedKVCache.load(tmp_path / "x", device=device)
        for layer in range(2):
            for ours, theirs in zip(model.cache.gather(layer), other.gather(layer), strict=True):
                np.testing.assert_array_equal(to_host(ours), to_host(theirs))


def test_the_default_device_is_the_gpu():
    assert "cupy on cuda:0" in repr(PagedKVCache(1, 1, 1, 1, 16))
    assert "numpy on host" in repr(PagedKVCache(1, 1, 1, 1, 16, device="cpu"))
