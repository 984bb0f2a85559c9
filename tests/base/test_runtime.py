"""The dtype of a machine: its processor and torch's kernels decide, and the clock where they are
unknown.
"""

import os

import pytest
import torch

from transom.base import runtime
from transom.base.runtime import pick_dtype

SKYLAKE = {"avx512_f": True, "avx512_bw": True, "avx512_bf16": False, "cpu_name": "bf16"}


@pytest.fixture(autouse=True)
def _ask_again():
    runtime.bfloat16_is_fast.cache_clear()
    yield
    runtime.bfloat16_is_fast.cache_clear()


def no_clock(tensor):
    raise AssertionError("the clock was asked")


@pytest.mark.parametrize(
    ("instructions", "kernels", "expected"),
    [
        ({"avx512_bf16": True}, True, torch.bfloat16),
        ({"amx_bf16": True}, True, torch.bfloat16),
        ({"bf16": True}, True, torch.bfloat16),
        (SKYLAKE, True, torch.float32),  # oneDNN accepts bfloat16 there, and converts it
        ({"avx512_bf16": True}, False, torch.float32),
    ],
)
def test_instructions_and_kernels_decide_without_a_clock(
    monkeypatch, instructions, kernels, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: kernels)
    monkeypatch.setattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: kernels, raising=False
    )
    monkeypatch.setattr(runtime, "_fastest", no_clock)
    assert pick_dtype("auto", torch.device("cpu")) == expected
    assert pick_dtype("float32", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(("half", "fast"), [(0.3, True), (0.45, False)])
def test_the_clock_decides_where_the_processor_is_unknown(monkeypatch, half, fast):
    seconds = {torch.bfloat16: half, torch.float32: 0.5}

    def fastest(call, device, repeats):
        return seconds[call().dtype]

    monkeypatch.setattr(runtime, "_cpu_instructions", lambda: None)
    monkeypatch.setattr(runtime, "_fastest", fastest)
    assert runtime.bfloat16_is_fast("cpu") is fast


def test_one_answer_serves_training_and_the_warning(monkeypatch, capsys):
    for instructions, dtype in (({"avx512_bf16": True}, torch.bfloat16), (SKYLAKE, torch.float32)):
        runtime.bfloat16_is_fast.cache_clear()
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda names=instructions: names, raising=False
        )
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False
        )
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        assert pick_dtype("auto", torch.device("cpu")) == dtype
        runtime.warn_if_bfloat16_is_slow(torch.bfloat16, torch.device("cpu"))
        assert ("bfloat16" in capsys.readouterr().err) == (dtype == torch.float32)


@pytest.mark.parametrize("given", [None, "7"])
def test_kernel_caches_are_bounded_unless_the_environment_bounds_them(monkeypatch, given):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        if given is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, given)
        runtime.bound_kernel_caches()
        assert os.environ[name] == (given or str(runtime.KEPT_KERNELS))
        monkeypatch.delenv(name)
