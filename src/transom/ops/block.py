"""Blocks of a model on a few rows with a KV cache, on the CPU: the structures of block.h.

`transom_blocks` computes what `layers.block.TransformerBlock` does, with float32 inside. A model is
translated by `inference.decode_plan`. `transom verify ops` compares the two.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from transom.ops.build import library
from transom.ops.weights import DENSE, KINDS, Weight

Fields = tuple[tuple[str, Any], ...]
MOST_ROWS = 32  # rows of one call, for which products read every weight once
# The numbers of the enums in elementwise.h and block.h.
NORMS = {"none": 0, "rms": 1, "rms_wide": 1, "rms_plus_one": 2, "layer": 3}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "clamped": 4}
ROUTINGS = {"softmax": 0, "sigmoid": 1, "biased_sigmoid": 2}


def _numbers(*names: str) -> Fields:
    return tuple((name, ctypes.c_int64) for name in names)


class Numbers(ctypes.Structure):
    """The numbers of a dense tensor without gaps; none by default."""

    _fields_ = (("data", ctypes.c_void_p), *_numbers("kind"))

    @classmethod
    def of(cls, tensor: Tensor | None) -> Numbers:
        """Point to a tensor of a dtype in `DENSE`, which the caller keeps."""
        if tensor is None:
            return cls()
        assert tensor.dtype in DENSE and tensor.is_contiguous(), "as the caller checked"
        return cls(tensor.data_ptr(), KINDS[tensor.dtype])


class NormArgs(ctypes.Structure):
    """A norm, or none."""

    _fields_ = (
        *_numbers("kind"),
        ("weight", Numbers),
        ("bias", Numbers),
        ("eps", ctypes.c_double),
    )


class FeedForwardArgs(ctypes.Structure):
    """A feed-forward, or one expert."""

    _fields_ = (
        *((name, Weight) for name in ("gate", "value", "out")),
        *_numbers("gated", "activation", "hidden"),
        ("limit", ctypes.c_double),
    )


class ExpertsArgs(ctypes.Structure):
    """A router with its experts."""

    _fields_ = (
        ("router", Weight),
        ("choice_bias", Numbers),
        ("experts", ctypes.c_void_p),
        ("shared", ctypes.c_void_p),
        *_numbers("count", "active", "routing", "normalize", "groups", "active_groups"),
        ("scale", ctypes.c_double),
    )


class BlockArgs(ctypes.Structure):
    """One block. `kept` has what its pointers point to."""

    kept: list[object]
    _fields_ = (
        *((name, NormArgs) for name in ("attention_norm", "attention_post_norm")),
        *((name, NormArgs) for name in ("ffn_norm", "ffn_post_norm", "q_norm", "k_norm")),
        *((name, Weight) for name in ("wq", "wk", "wv", "wo")),
        ("feed_forward", FeedForwardArgs),
        ("experts", ctypes.c_void_p),
        ("sinks", Numbers),
        *_numbers("dim", "heads", "kv_heads", "head_dim"),
        *_numbers("norm_heads", "norm_rotated", "halves"),
        *((name, ctypes.c_double) for name in ("scale", "softcap", "norm_eps")),
    )


class SlotsArgs(ctypes.Structure):
    """Where the rows of a call are stored, and which slots they see by one mask rule."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("written", "positions")),
        *_numbers("position_stride", "shown", "window", "chunk"),
    )


class StatesArgs(ctypes.Structure):
    """Keys or values [B, S, K, H] of one layer."""

    _fields_ = (
        ("numbers", Numbers),
        ("scales", ctypes.c_void_p),
        *_numbers("sequence_stride", "slot_stride", "dtype"),
    )

    @classmethod
    def of(cls, states: Tensor, scales: Tensor | None, dtype: torch.dtype) -> StatesArgs:
        """Point to keys or values of a dtype, or to their codes and scales.

        The caller keeps the tensors.
        """
        numbers = Numbers(states.data_ptr(), KINDS[states.dtype])
        address = None if scales is None else scales.data_ptr()
        return cls(numbers, address, states.stride(0), states.stride(1), KINDS[dtype])


class RotationArgs(ctypes.Structure):
    """cos and sin of the rows of a call, float32 [rows, pairs] each."""

    _fields_ = (("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), *_numbers("pairs"))


class LayerArguments(ctypes.Structure):
    """One block in one call."""

    _fields_ = (
        ("block", ctypes.c_void_p),
        ("keys", StatesArgs),
        ("values", StatesArgs),
        *((name, ctypes.c_void_p) for name in ("slots", "rotation", "temperature")),
    )


class CallArgs(ctypes.Structure):
    """The rows of one call."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *_numbers("kind", "rows", "tokens"),
        ("positions", ctypes.c_void_p),
        *_numbers("threads"),
        ("norm", ctypes.c_void_p),
    )


def run_blocks(
    x_BTD: Tensor,
    positions_BT: Tensor,
    layers: ctypes.Array[LayerArguments],
    start: int,
    end: int,
    norm: NormArgs | None = None,
    threads: int | None = None,
) -> None:
    """Compute blocks one after the other, and replace x by their result.

    Args:
        x_BTD: The residual stream [B, T, D] on the CPU in a dtype of `DENSE`, without gaps. Rows of
            padding stay as they are.
        positions_BT: int64 [B, T] without gaps; -1 is padding.
        layers: An array of layers.
        start: The first layer to compute.
        end: The layer after the last one.
        norm: A norm after these layers, if any.
        threads: As many as PyTorch uses by default.

    Raises:
        MemoryError: There is no memory for the buffers of a call.
    """
    native = library()
    assert native is not None, "layers are filled only where there is a library"
    rows, tokens = positions_BT.numel(), positions_BT.size(1)
    threads, kind = threads or torch.get_num_threads(), KINDS[x_BTD.dtype]
    call = CallArgs(x_BTD.data_ptr(), kind, rows, tokens, positions_BT.data_ptr(), threads)
    if norm is not None:
        call.norm = ctypes.addressof(norm)
    if native.transom_blocks(
        ctypes.byref(call), ctypes.byref(layers[start]), ctypes.c_int64(end - start)
    ):
        raise MemoryError("no memory for the blocks of a few rows")
