"""What the planner is told of a device, on one that is not there."""

import ctypes
from types import SimpleNamespace

import pytest

from cupy_fp8kv.jit import device
from cupy_fp8kv.plan import DeviceInfo


@pytest.mark.parametrize("bound", [True, False], ids=["driver", "runtime"])
def test_what_the_planner_is_told_of_a_device(monkeypatch, bound):
    asked = []

    class Runtime:
        cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin = 16, 97  # noqa: N815

        def deviceGetAttribute(self, attribute, index):  # noqa: N802
            assert index == 1
            return {16: 132, 97: 232448}[attribute]

        def getDeviceProperties(self, index):  # noqa: N802
            asked.append(index)
            return {"name": b"a GPU"}

    def get_name(address, length, index):
        assert (length, index) == (256, 1)
        ctypes.memmove(address, b"a GPU\0", 6)
        return 0

    cuda = SimpleNamespace(runtime=Runtime(), Device=lambda index: SimpleNamespace(compute_capability="90"))
    monkeypatch.setattr(device, "require_cupy", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(device, "driver_function", lambda name, arguments: get_name if bound else None)
    assert device.device_info.__wrapped__(1) == DeviceInfo("a GPU", 90, 132, 232448)
    assert asked == ([] if bound else [1]), "the runtime's properties take long"
