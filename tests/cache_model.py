"""A PagedKVCache and the same as plain lists, for the tests of every backend and library."""

import numpy as np

import cupy_fp8kv
from cupy_fp8kv import PagedKVCache
from cupy_fp8kv.backends import reference

LAYERS, HEADS, D = 2, 2, 32

KINDS = {
    "e4m3": {}, "number": {"scales": 0.25}, "e5m2": {"format": "e5m2", "kv_layout": "HND"},
    "f16": {"format": np.float16},
    "bf16": {"format": "bf16", "scales": (None, 2.0)}, "pair": {"format": ("f16", "e4m3"), "scales": (None, 0.1)},
    "heads": {"scales": (np.array([0.1, 0.3], np.float32), 0.5)},
    "layers": {"scales": np.array([[0.1, 0.3], [0.2, 0.05]], np.float32), "kv_layout": "HND"},
    "token": {"scales": "token"}, "token HND": {"scales": "token", "format": ("e4m3", "e5m2"), "kv_layout": "HND"},
}  # fmt: skip


class Model:
    """The same cache as plain lists of float32 rows as they are stored, by request and layer."""

    def __init__(self, options, move=lambda x: x, download=np.asarray, num_pages=16, page_size=4, **more):
        self.cache = PagedKVCache(LAYERS, num_pages, page_size, HEADS, D, **options, **more)
        self.move, self.download, self.options = move, download, options
        self.rng = np.random.default_rng(0)
        self.rows = {}

    def allocate(self, name):
        assert self.cache.allocate(name) == name
        self.rows[name] = [[] for _ in range(LAYERS)]

    def fork(self, name, new):
        assert self.cache.fork(name, new) == new
        self.rows[new] = [list(rows) for rows in self.rows[name]]

    def free(self, name):
        self.cache.free(name)
        del self.rows[name]

    def append(self, layer, counts):
        """Append to several requests of ``counts``, or to one."""
        total = sum(counts.values())
        k, v = self.rng.standard_normal((2, total, HEADS, D)).astype(np.float16)
        names = list(counts)
        if len(names) == 1:
            self.cache.append(layer, names[0], self.move(k), self.move(v))
        else:
            self.cache.append(layer, names, self.move(k), self.move(v), list(counts.values()))
        stored = [self.stored(side, layer, x) for side, x in enumerate((k, v))]
        at = 0
        for name, n in counts.items():
            self.rows[name][layer] += [(stored[0][i], stored[1][i]) for i in range(at, at + n)]
            at += n

    def stored(self, side, layer, x):
        """The values that the cache holds of ``x[n, H, D]``, scaled back."""
        formats = self.options.get("format", "e4m3")
        fmt = cupy_fp8kv.formats.kv_format(formats[side] if isinstance(formats, tuple) else formats)
        scales = self.options.get("scales")
        if isinstance(scales, str):
            scale = reference.amax_scale(x, fmt, "token")[..., None]
        else:
            scale = np.float32(1 if (s := scales[side] if isinstance(scales, tuple) else scales) is None else s)
            scale = (scale[layer] if scale.ndim == 2 else scale).reshape(-1, 1)
        y = x.astype(np.float32) / scale
        return (reference.to_float(reference.encode(y, fmt), fmt) if fmt.is_fp8 else y.astype(fmt.dtype).astype(
            np.float32)) * scale  # fmt: skip

    def check(self, names=None, tolerance=2e-3):
        chosen = list(self.rows) if names is None else names
        q = self.rng.standard_normal((len(chosen), 3 * HEADS, D)).astype(np.float16)
        for layer in range(LAYERS):
            out, lse = self.cache.decode(layer, self.move(q), names, return_lse=True)
            out, lse = self.download(out), self.download(lse)
            assert out.shape == q.shape and out.dtype == q.dtype
            for b, name in enumerate(chosen):
                want, want_lse = attention(q[b], self.rows[name][layer])
                np.testing.assert_allclose(out[b].astype(np.float32), want, atol=tolerance, rtol=tolerance)
                np.testing.assert_allclose(lse[b], want_lse, atol=2e-3, rtol=1e-3)
        assert self.cache.requests == tuple(self.rows) and len(self.cache) == len(self.rows)


def attention(q, rows):
    """Plain softmax attention of ``q[Hq, D]``, and its log-sum-exp, base 2."""
    if not rows:
        return np.zeros(q.shape), np.full(len(q), -np.inf)
    k, v = (np.repeat(np.stack([row[i] for row in rows]), 3, axis=1).astype(np.float64) for i in range(2))
    logits = np.einsum("hd,nhd->hn", q.astype(np.float64), k) / np.sqrt(D)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    total = weights.sum(axis=1)
    out = np.einsum("hn,nhd->hd", weights / total[:, None], v)
    return out, (np.log(total) + logits.max(axis=1)) / np.log(2)


def life(model):
    """Prompts, steps, forks that write and are written around, requests that go and others that take their pages."""
    model.check()
    for name, n in (("a", 9), ("b", 0), ("c", 4)):
        model.allocate(name)
        for layer in range(LAYERS):
            if n:
                model.append(layer, {name: n})
    model.check()
    model.fork("a", "d")
    used = model.cache.allocator.num_free
    for step in range(3):
        for layer in range(LAYERS):
            model.append(layer, dict.fromkeys(model.rows, 1) if step else {"d": 2, "a": 1, "b": 5, "c": 3})
        model.check()
    assert model.cache.allocator.num_free < used
    model.free("a")
    model.allocate("e")
    for layer in reversed(range(LAYERS)):
        model.append(layer, {"e": 7, "d": 1})
    model.check()
    model.check(["e", "b"])
    return model
