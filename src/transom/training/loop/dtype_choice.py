"""The choice between float32 and bfloat16 for the matrix products of a run on a CPU.

A processor with bfloat16 instructions multiplies large matrices faster in bfloat16, but small ones
slower, since the conversions around them cost more than the products save. A step of the run is
therefore timed in both.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transom.base.errors import notice
from transom.base.runtime import dtype_name, is_out_of_memory
from transom.config.model_args import ModelArgs
from transom.data.batch import Batch
from transom.data.order import Batches
from transom.distributed.ranks import Ranks
from transom.models.llm import LLM
from transom.planning.counts import parameters
from transom.training.loop.random_states import random_state, restore_random_state
from transom.training.losses.objectives import Objective

TIMED_TOKENS = 2048  # enough to find the faster dtype
MOST_PARAMETERS = 500_000_000  # a larger model is not timed: it may not fit in float32
SHORT_PASSES = 3  # at most so many passes are timed,
SHORT_SECONDS = 2.0  # and no more after so many seconds
CLEARLY = 1.1  # bfloat16 rounds, so it has to be faster by this factor,
SECONDS = 0.005  # and by so many seconds: below, the load of the machine would decide


@dataclass
class DtypeChoice:
    """The dtype of the matrix products of a run.

    All ranks or none call `settle`, and all take the choice of rank 0.

    Attributes:
        dtype: The dtype. While the choice is open, this is what the device suggests.
        is_open: Whether a step has still to be timed.
        ranks: The ranks of the run.
    """

    dtype: torch.dtype
    is_open: bool
    ranks: Ranks

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, ranks: Ranks) -> DtypeChoice:
        """Return the choice of `dtype: name` in a config, where the device suggests `dtype`."""
        # Ranks that have parts of the model would have to agree on every pass that is timed.
        timed = ranks.device.type == "cpu" and not ranks.divided
        candidate = name == "auto" and dtype == torch.bfloat16 and timed
        # The processors of the ranks may differ.
        return cls(ranks.first(dtype) if name == "auto" else dtype, ranks.first(candidate), ranks)

    def settle(
        self, model: LLM, objective: Objective, batches: Batches, items: int, *, frozen: bool
    ) -> None:
        """Time a step of the run in both dtypes, take the faster one and print both times.

        Args:
            model: The model, in training state.
            objective: The loss that is timed.
            batches: The batches of the run.
            items: Items of this rank in a step.
            frozen: Whether some weights do not train. They are cast to bfloat16, and the caller
                has to load the model again. Otherwise weights, random state and the position in
                the data do not change.
        """
        self.limit(model.args)
        if not self.is_open:
            return
        self.is_open = False
        random, was_training = random_state(self.ranks.device), model.training
        micro = timed_batch(batches, items)
        model.train()
        try:
            slow = seconds_of_step(model, objective, micro, torch.float32)
            if frozen:
                cast_frozen(model, torch.bfloat16)
            fast = seconds_of_step(model, objective, micro, torch.bfloat16)
        except Exception as error:
            if not is_out_of_memory(error):  # the dry run reports it and what to change
                raise
            slow = fast = float("inf")
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        restore_random_state(self.ranks.device, random)
        faster = self.ranks.first(fast * CLEARLY < slow and slow - fast > SECONDS)
        self.dtype = torch.bfloat16 if faster else torch.float32
        rows, length = micro.tokens.shape
        if self.ranks.rank == 0:
            notice(
                f"chosen: dtype = {dtype_name(self.dtype)}: {rows} x {length} tokens forward and "
                f"backward take {slow:.2g} s in float32, {fast:.2g} s in bfloat16"
            )

    def limit(self, args: ModelArgs) -> None:
        """Close the choice for a model that is too large to be timed in float32."""
        self.is_open = self.is_open and parameters(args) <= MOST_PARAMETERS


def seconds_of_step(model: LLM, objective: Objective, micro: Batch, dtype: torch.dtype) -> float:
    """Return the seconds of a forward and a backward pass, the fastest of several short ones."""
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) <= SHORT_PASSES and sum(seconds) < SHORT_SECONDS):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(replace(micro.inputs(), logits="none"))
            loss: Tensor = objective.loss(output, micro, torch.ones(()))["loss"]
        loss.backward()
        seconds.append(time.perf_counter() - started)
        model.zero_grad(set_to_none=True)
    return min(seconds[1:])  # the first pass also builds kernels and reads weights from their files


def cast_frozen(model: LLM, dtype: torch.dtype) -> None:
    """Cast the weights that do not train, as loading them in `dtype` would."""
    for weight in model.parameters():
        if not weight.requires_grad and weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def timed_batch(batches: Batches, items: int) -> Batch:
    """Return the longest rows of the run: at most `items`, with about `TIMED_TOKENS` tokens."""
    micro: Batch = batches.largest(1)
    for pieces in range(2, items + 1):
        if items % pieces == 0 and micro.tokens.numel() > TIMED_TOKENS:
            micro = batches.largest(pieces)
    return micro
