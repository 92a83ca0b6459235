import shutil

import emulator
import pytest


@pytest.fixture(scope="session")
def machine(tmp_path_factory):
    """The emulator that keeps what it compiled for all tests."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernels for this CPU")
    return emulator.Emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulate(machine, monkeypatch):
    """Inside the test, the CUDA backend is the emulator."""
    with machine.installed(monkeypatch):
        yield machine
