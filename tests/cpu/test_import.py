"""What importing the package costs: which modules it brings, and public names that come when they are asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cupy_fp8kv

ROOT = Path(cupy_fp8kv.__file__).parent.parent
#: Each is several milliseconds that a decode does not need, or much more.
HEAVY = {
    "argparse", "asyncio", "concurrent.futures", "cupy", "cupy_backends", "cupyx", "email", "importlib.metadata", "jax",
    "jaxlib", "logging", "matplotlib", "multiprocessing", "pytest", "rich", "safetensors", "socket", "ssl",
    "subprocess", "tempfile", "torch", "unittest",
}  # fmt: skip
#: Ours that a decode of a padded cache does not need.
LATER = {
    "allocator", "append", "append_checks", "append_tables", "appending", "bench", "cache", "cache_files",
    "cache_storage", "cascade", "cli", "decode_plan", "demo", "graph_buffers", "info", "jit.covering", "merging",
    "offline", "page_moves", "page_tables", "paged", "paged_wrappers", "terminal", "tuning.tune", "workspaces",
}  # fmt: skip
_DECODE = (
    "import numpy; q, k = numpy.ones((1, 2, 64), 'float16'), numpy.zeros((1, 4, 2, 64), 'uint8'); "
    "cupy_fp8kv.batch_decode_with_padded_kv_cache(q, k, k, backend='numpy')"
)


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("then", ["", _DECODE], ids=["import", "decode"])
def test_what_is_not_imported(then):
    # NumPy's own and those of site-packages' .pth files are not counted.
    code = (
        "import sys, numpy, ml_dtypes; before = set(sys.modules); import cupy_fp8kv\n"
        f"{then}\nprint(*(set(sys.modules) - before))"
    )
    imported = set(in_a_new_process(code))
    assert "cupy_fp8kv.decode" in imported
    assert not imported & (HEAVY | {f"cupy_fp8kv.{name}" for name in LATER})


def test_the_modules_that_come_later_exist():
    """So that a module which gets another name is not forgotten above."""
    for name in LATER:
        path = ROOT / "cupy_fp8kv" / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name


def test_every_public_name_comes_when_it_is_asked_for():
    names = cupy_fp8kv.__all__
    assert set(names) <= set(dir(cupy_fp8kv)) and sorted(set(names)) == sorted(names)
    assert not [name for name in names if isinstance(getattr(cupy_fp8kv, name), type(sys))]
    for module, later in cupy_fp8kv._LATER.items():
        code = (
            f"import sys, cupy_fp8kv; before = {f'cupy_fp8kv.{module}'!r} in sys.modules; names = {later!r}; "
            "assert set(names) <= set(dir(cupy_fp8kv)); found = [getattr(cupy_fp8kv, name) for name in names]; "
            "print(before, *(one.__module__ for one in found))"
        )
        assert in_a_new_process(code) == ["False", *[f"cupy_fp8kv.{module}"] * len(later)]


def test_star_gives_every_public_name():
    code = "import cupy_fp8kv; from cupy_fp8kv import *; print(*(n for n in cupy_fp8kv.__all__ if n not in globals()))"
    assert in_a_new_process(code) == []


def test_what_comes_later_is_public_and_typed():
    """The names that type checkers see are those that are imported when they are asked for."""
    tree = ast.parse(Path(cupy_fp8kv.__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {node.module: tuple(alias.name for alias in node.names) for node in checked.body}
    assert typed == cupy_fp8kv._LATER
    assert set(cupy_fp8kv._MODULE_OF) <= set(cupy_fp8kv.__all__)


def test_no_module_takes_the_place_of_what_comes_later():
    modules = {path.stem for path in (ROOT / "cupy_fp8kv").iterdir()}
    assert not modules & set(cupy_fp8kv._MODULE_OF)


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="'cupy_fp8kv' has no attribute 'attention'"):
        cupy_fp8kv.attention  # noqa: B018
    assert not hasattr(cupy_fp8kv, "tuned")
    with pytest.raises(ImportError, match="cannot import name 'attention'"):
        from cupy_fp8kv import attention  # noqa: F401


def test_functions_with_the_name_of_their_module_stay_functions():
    from cupy_fp8kv import explain, quantize

    codes, _ = quantize(np.ones((2, 32), np.float32))
    assert codes.shape == (2, 32) and callable(explain)
    code = "import cupy_fp8kv.explain, cupy_fp8kv.quantize as q; print(callable(q), callable(cupy_fp8kv.explain))"
    assert in_a_new_process(code) == ["True", "True"]
