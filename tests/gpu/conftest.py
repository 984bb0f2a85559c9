"""`EMULATE_GPU=1`: these tests run on the emulated device of tests/gpu/emulated, without a GPU."""

import os

import pytest

EMULATED = os.environ.get("EMULATE_GPU") == "1"
# 32k tokens without fused kernels, kernels that a profiler of CUDA counts, and NCCL.
NEED_KERNELS = (
    "test_auto_is_linear_in_memory_at_32k",
    "test_joined_weights_are_multiplied_by",
    "test_the_ring_equals_gathered_keys",
)

if EMULATED:
    from tests.gpu.emulated.install import install, why_not
    from transom.base import runtime

    if reason := why_not():
        raise pytest.UsageError(f"EMULATE_GPU=1: the emulated device {reason}")
    install()
    runtime.matmul_peak = lambda device_type, dtype: 1e12  # it would take minutes


def pytest_collection_modifyitems(items):
    for item in items:
        if EMULATED and item.name.startswith(NEED_KERNELS):
            item.add_marker(pytest.mark.skip(reason="needs the kernels of a GPU"))
