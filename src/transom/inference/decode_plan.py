"""The decode plan: the blocks of a built model as one call in C++ for a few rows on the CPU.

A step of one token runs some ten small operators per block, and PyTorch needs longer to start them
than the CPU needs to compute them. A plan points to the weights of the model. Dense ones stay as
they are, and codes are brought into tiles (`quantize.leaves.tile_weights`). Blocks with an option
that C++ doesn't cover run as modules, between those that it does.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from transom.attention.backends import auto
from transom.base.errors import notice
from transom.base.runtime import one_thread
from transom.cache.model_cache import ModelCache
from transom.cache.store import SlotStore
from transom.config.layer_args import LayerRule, RopeArgs
from transom.inference.native_blocks import (
    NativeBlock,
    NotCovered,
    Watch,
    native_block,
    norm_of,
    weight_of,
)
from transom.inference.step_times import part
from transom.layers.moe import RouterStatistics
from transom.layers.step import Step
from transom.models.llm import LLM, Runner
from transom.ops import block as ops
from transom.ops import products
from transom.ops.build import library
from transom.ops.weights import DENSE, Weight
from transom.quantize.leaves import tile_weights


class DecodePlan:
    """How the layers and the output of a model run on few rows; see `LLM.forward`.

    Build one with `decode_plan`. It serves one stream of calls, and keeps the tensors that the
    parameters were at its beginning. What is written into them later counts, as in training
    between two tokens. A call after a hook or an adapter was added makes the plan again.

    Args:
        model: A language model on the CPU.
    """

    def __init__(self, model: LLM) -> None:
        self.model = model
        self.threads = torch.get_num_threads()  # of C++; PyTorch itself may use one
        self._make()

    def _make(self) -> None:
        tile_weights(self.model)
        self._watch = Watch()
        self._blocks: dict[int, NativeBlock] = {}
        missing: Counter[str] = Counter()
        for index, module in enumerate(self.model.layers):
            try:
                self._blocks[index] = native_block(module, self._watch)
            except NotCovered as reason:
                missing[str(reason)] += 1
        if missing:
            count, layers = sum(missing.values()), len(self.model.layers)
            slower = f"{count} of {layers} layers run in PyTorch, which is slower"
            notice(f"decoding: {slower}: {'; '.join(missing)}")
        self._output: Weight | None = None
        self._norm: ops.NormArgs | None = None
        with suppress(NotCovered):
            self._norm = norm_of(self.model.norm, self._watch)
        with suppress(NotCovered):
            self._output = weight_of(self.model.output or self.model.tok_embeddings, self._watch)
        self._layers = (ops.LayerArguments * len(self.model.layers))()
        for index, block in self._blocks.items():
            self._layers[index].block = ctypes.addressof(block.args)
        self._cache: ModelCache | None = None

    @property
    def covered(self) -> int:
        """How many blocks run in C++."""
        return len(self._blocks)

    @property
    def covers_all(self) -> bool:
        """Whether all blocks run in C++."""
        return self.covered == len(self._layers)

    def run_layers(
        self, h_BTD: Tensor, step: Step, cache: ModelCache | None
    ) -> tuple[Tensor, tuple[RouterStatistics, ...]]:
        """Compute all blocks, like `LLM.run_layers`.

        Returns:
            Normed hidden states [B, T, D], and the statistics of the routers of the blocks that
            ran as modules.
        """
        fits = step.positions_BT.numel() <= ops.MOST_ROWS and step.attend is auto
        fits = fits and h_BTD.dtype in DENSE and not torch.is_autocast_enabled("cpu")
        if not fits or cache is None or library() is None:
            return self.model.run_layers(h_BTD, step, cache)
        if not self._watch.same():
            self._make()
        kept = self._point(step, cache)
        if not kept:
            return self.model.run_layers(h_BTD, step, cache)
        positions_BT = kept[0]
        router: list[RouterStatistics] = []
        for native, group in groupby(range(len(self._layers)), self._blocks.__contains__):
            indices = list(group)
            if native:
                h_BTD = h_BTD.clone(memory_format=torch.contiguous_format)
                start, end = indices[0], indices[-1] + 1
                norm = self._norm if end == len(self._layers) else None
                with part("blocks in C++"):
                    ops.run_blocks(
                        h_BTD, positions_BT, self._layers, start, end, norm, self.threads
                    )
                if norm is not None:
                    return h_BTD, tuple(router)
                continue
            for index in indices:
                with part("blocks in PyTorch"):
                    h_BTD, statistics = self.model.layers[index](h_BTD, step, cache.layers[index])
                router += [] if statistics is None else [statistics]
        return self.model.norm(h_BTD), tuple(router)

    def project(self, h_D: Tensor) -> Tensor:
        """Return the logits [..., V] of normed hidden states [..., D], like `LLM.project`."""
        made = None
        if self._output is not None and products.takes(h_D):
            with part("output"), one_thread():  # of PyTorch, which rounds the logits
                made = products.multiply(h_D, [self._output], self.threads)
        return self.model.project(h_D) if made is None else self.model.finish_logits(made[0])

    def _point(self, step: Step, cache: ModelCache) -> list[Tensor]:
        """Let the layers point to what a call reads, and return the tensors that they point to.

        The positions [B, T] come first. The list is empty if the call needs what C++ doesn't do:
        the first call of a cache, or one that is too long for a ring.
        """
        if any(
            store.placement is None or store.placement.new_at is not None for store in cache.stores
        ):
            return []
        if not self._is_bound(cache) and not self._bind(cache):
            return []
        kept = [step.positions_BT.contiguous()]

        def address(tensor: Tensor) -> int:
            kept.append(tensor.contiguous())
            return kept[-1].data_ptr()

        for (store, _), slots in self._slots.items():
            call = store.placement
            assert call is not None, "checked before"
            slots.written, slots.positions = address(call.slots_BT), call.positions_BS.data_ptr()
            slots.position_stride, slots.shown = (
                call.positions_BS.stride(0),
                call.positions_BS.size(1),
            )
        for rope, rotation in self._rotations.items():
            cos, sin = step.rope[rope]
            rotation.cos, rotation.sin, rotation.pairs = address(cos), address(sin), cos.size(-1)
        for index, block in self._blocks.items():
            if block.layer.temperature is not None:
                self._layers[index].temperature = address(step.temperature[block.layer.temperature])
        return kept

    def _is_bound(self, cache: ModelCache) -> bool:
        """Return whether the layers point to the states of this cache."""
        return self._cache is cache and all(
            cache.layers[index].states is states for index, states in self._states.items()
        )

    def _bind(self, cache: ModelCache) -> bool:
        """Let the layers point to the states of a cache; return False for states of other kinds."""
        self._cache = None
        self._states = {index: cache.layers[index].states for index in self._blocks}
        self._slots: dict[tuple[SlotStore, LayerRule], Any] = {}
        self._rotations: dict[RopeArgs, Any] = {}
        for index, states in self._states.items():
            scales = cache.layers[index].scales or (None, None)
            if len(states) != 2 or any(x.dtype not in (*DENSE, torch.int8) for x in states):
                return False
            layer, rule = self._layers[index], self._blocks[index].layer.rule
            dtypes = self.model.dtype, self.model.dtype
            layer.keys, layer.values = map(ops.StatesArgs.of, states, scales, dtypes)
            key = (cache.layers[index].store, rule)
            lengths = {rule.kind: rule.size} if rule.size else {}
            slots = self._slots.setdefault(key, ops.SlotsArgs(**lengths))
            layer.slots = ctypes.addressof(slots)
            rope = self._blocks[index].layer.rope
            if rope is not None:
                layer.rotation = ctypes.addressof(
                    self._rotations.setdefault(rope, ops.RotationArgs())
                )
        self._cache = cache
        return True


def alone(runner: Runner | None, rows: int = 1) -> AbstractContextManager[None]:
    """Return a context in which PyTorch uses one thread, if a plan computes so many rows in C++.

    Threads of OpenMP wait for more work for milliseconds, on the cores that the plan needs next.
    """
    fits = isinstance(runner, DecodePlan) and rows <= ops.MOST_ROWS and runner.covers_all
    return one_thread() if fits else nullcontext()


def decode_plan(model: LLM) -> DecodePlan | None:
    """Return the plan of a model, or None where C++ can't help: the plain path is as good.

    That is on other devices than the CPU, in float64, without a compiler, with `TRANSOM_OPS=0`, if
    the user has chosen an attention backend, or if this process has a part of the weights only.
    """
    parts = any(type(weight) is not nn.Parameter for weight in model.parameters())
    if parts or "run_layers" in vars(model):  # a stage of a pipeline runs its layers itself
        return None
    fits = model.device.type == "cpu" and model.dtype in DENSE and model.attend is auto
    return DecodePlan(model) if fits and library() is not None else None
