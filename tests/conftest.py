"""Tests import ``oracle``, ``cases`` and ``pairwise`` by name: pyproject.toml puts ``tests/`` on the path."""

import os

import pytest

from cupy_fp8kv.jit.device import cupy_problem
from cupy_fp8kv.tuning import store

# JAX would take three quarters of the device's memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=100, help="random paged problems that GPU tests run")
    parser.addoption("--fuzz-seed", type=int, default=0, help="the seed of the first of them")


def pytest_collection_modifyitems(items):
    problem = cupy_problem()
    if problem:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {problem}"))


@pytest.fixture(autouse=True)
def tuned_plans(monkeypatch, tmp_path):
    """A folder of the test's own: plans that were tuned on this machine must not change what a test runs."""
    folder = tmp_path / "tuned plans"
    monkeypatch.setattr(store, "folder", lambda: folder)
    return folder
