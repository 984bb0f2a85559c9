"""Decode steps of compiled blocks. On a CUDA device, a step is replayed as one CUDA graph.

The blocks of a model are compiled one by one, so layers of one kind share their kernels, and a new
length of the view of the cache compiles little. A CUDA graph contains all kernels of a step with
their arguments: the host starts it in one call. Numbers that change from token to token are in
tensors that stay in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from transom.base.errors import RequestError, WorkError, expect, notice, one_line
from transom.base.runtime import is_out_of_memory
from transom.cache.model_cache import ModelCache
from transom.cache.store import BUCKET
from transom.inference.forward import forward_logits
from transom.layers.compiled import compile_forward
from transom.layers.inputs import TransformerInput
from transom.layers.moe import RouterStatistics
from transom.layers.step import Step
from transom.models.llm import LLM
from transom.quantize.leaves import quantized_leaves

# On CUDA: products of one row as generated kernels, which read weights at the speed of memory and
# compute them from codes on the way, only if their blocks are tuned.
CUDA_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}
_failed: WeakSet[LLM] = WeakSet()  # models that can't be compiled here: nobody waits for it again


def compiled_steps(model: LLM) -> CompiledSteps | None:
    """Return the compiled steps of a model, or None where the plain ones are faster.

    Raises:
        RequestError: Weights of the model are offloaded.
    """
    offloaded = any(one.is_meta for one in model.parameters())
    expect(not offloaded, "compile", True, "False for a model with offloaded layers")
    if model.device.type == "cpu" and quantized_leaves(model):
        notice(
            "compile: quantized weights decode faster without --compile on the CPU: it is ignored"
        )
        return None
    return CompiledSteps(model)


class CompiledBlocks:
    """Runs the blocks of a model and its output compiled; a `Runner`."""

    def __init__(self, model: LLM, **options: Any) -> None:
        self._blocks = [compile_forward(block.forward, **options) for block in model.layers]
        self._norm = model.norm
        self.project: Callable[[Tensor], Tensor] = compile_forward(model.project, **options)

    def run_layers(
        self, h_BTD: Tensor, step: Step, cache: ModelCache | None
    ) -> tuple[Tensor, tuple[RouterStatistics, ...]]:
        """Return normed hidden states [B, T, D] after all blocks, and statistics of routers."""
        router = []
        for index, block in enumerate(self._blocks):
            h_BTD, statistics = block(h_BTD, step, None if cache is None else cache.layers[index])
            router += [] if statistics is None else [statistics]
        return self._norm(h_BTD), tuple(router)


class CompiledSteps:
    """`forward_logits` for calls of one token per row. Where compiling fails, steps run plainly.

    Args:
        model: The model, which stays as it is between two calls.
    """

    def __init__(self, model: LLM) -> None:
        self._model = model
        self._key: tuple[ModelCache, int, bool] | None = None
        self._graph: StepGraph | None = None  # of the steps of this key
        self._records = model.device.type == "cuda"
        self._blocks: CompiledBlocks | None = None
        if model not in _failed:
            self._blocks = CompiledBlocks(model, **(CUDA_OPTIONS if self._records else {}))

    def __call__(self, inputs: TransformerInput, cache: ModelCache) -> Tensor:
        """Return the logits [B, 1, V] of one call. On CUDA the next call may overwrite them."""
        if cache.bounded and cache.bound == cache.capacity:
            cache.sync_length()  # a recorded step can't wait for the device
        key = (cache, -(-(cache.bound + 1) // BUCKET), inputs.lengths is not None)
        if not self._records or key != self._key:
            self._key, self._graph = key, None
            return self._run(inputs, cache)  # it compiles and tunes; the next one is recorded
        if self._graph is None:
            state = cache.bound, cache.peak, cache.rolled_back
            try:
                self._graph = StepGraph(self._model, self._blocks, inputs, cache)
            except RuntimeError as error:
                self._records = False
                notice(f"compile: no CUDA graph ({one_line(error)}); kernels start one by one")
            cache.bound, cache.peak, cache.rolled_back = state  # nothing was computed so far
        return self._run(inputs, cache) if self._graph is None else self._graph(inputs, cache)

    def _run(self, inputs: TransformerInput, cache: ModelCache) -> Tensor:
        """Run the step now, without compiled blocks from their first failure on."""
        state = cache.bound, cache.peak, cache.rolled_back
        try:
            return forward_logits(self._model, inputs, cache, self._blocks)
        except Exception as error:
            refused = isinstance(error, (RequestError, WorkError)) or is_out_of_memory(error)
            if refused or self._blocks is None:
                raise
            notice(f"compile: failed ({one_line(error)}); the model runs uncompiled")
        self._blocks = None
        _failed.add(self._model)
        # What layers have stored is stored again.
        cache.bound, cache.peak, cache.rolled_back = state
        return forward_logits(self._model, inputs, cache)


class StepGraph:
    """One decode step as a CUDA graph, and what the host has to count when it is replayed.

    The step runs once, and the device records what it would compute.

    Args:
        model: The model.
        blocks: What runs its layers; the model itself for None.
        inputs: The input of the step.
        cache: The cache of the step and of those that repeat it.

    Raises:
        RuntimeError: The step can't be recorded, for example because the host reads a number in it.
    """

    def __init__(
        self,
        model: LLM,
        blocks: CompiledBlocks | None,
        inputs: TransformerInput,
        cache: ModelCache,
    ) -> None:
        self._tokens_B1 = inputs.tokens.clone()
        self._lengths_B = None if inputs.lengths is None else inputs.lengths.clone()
        fixed = TransformerInput(self._tokens_B1, lengths=self._lengths_B, logits="last")
        self._replay = record(lambda: forward_logits(model, fixed, cache, blocks))

    def __call__(self, inputs: TransformerInput, cache: ModelCache) -> Tensor:
        """Return the logits [B, 1, V] of one more step, in the memory of the last ones."""
        cache.reserve(1, inputs.lengths)
        cache.peak = max(cache.peak, cache.bound)
        if inputs.lengths is None:  # as `end_call` counts
            cache.rolled_back = max(0, cache.rolled_back - 1)
        elif self._lengths_B is not None:
            self._lengths_B.copy_(inputs.lengths)
        self._tokens_B1.copy_(inputs.tokens)
        return self._replay()


def record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a function that repeats the kernels of `function` as a CUDA graph."""
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function()
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
