"""One optimizer step: forward and backward passes over micro-batches, the update of the weights."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transom.base.copies import to_device
from transom.base.errors import RequestError, WorkError, expect, notice, one_line
from transom.base.interrupts import STOPS
from transom.base.runtime import is_out_of_memory, memory_bytes, reset_peak_memory, synchronize
from transom.data.batch import Batch
from transom.distributed.failures import is_lost
from transom.distributed.pipeline import stage_of
from transom.distributed.ranks import Ranks
from transom.training.config import TrainArgs
from transom.training.loop.blocks import OFFLOAD_MIN_BYTES, arrange_blocks
from transom.training.loop.nonfinite import ALL_FINITE, locate_nonfinite
from transom.training.loop.profile import StepClock
from transom.training.loop.progress import Progress, ProgressLine, StopRequest
from transom.training.loop.random_states import random_state, restore_random_state
from transom.training.loop.run_folder import RunFolder
from transom.training.loop.run_parts import RunParts
from transom.training.losses.balance import RouterCounts, router_parts, update_choice_biases
from transom.training.optim.ema import Ema
from transom.training.optim.optimizers import (
    BackwardOptimizers,
    build_optimizer,
    width_multiplier,
)
from transom.training.optim.schedule import lr_scale


class StepTotals(NamedTuple):
    """Totals of one step over all micro-batches and ranks, as float32 scalars (exact to 2^24).

    Attributes:
        units: What the loss is divided by, see `Objective.units`.
        tokens: Tokens that are not padding.
    """

    units: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: Mean loss per target, in nats for most objectives.
        grad_norm: Global norm of the gradients before clipping.
        row_length: Tokens of the longest row.
        tokens: Tokens of all ranks that are not padding.
        parts: Other numbers that the objective reports, such as `aux_loss`.
        router: What the routers of mixtures of experts chose.
    """

    loss: float
    grad_norm: float
    row_length: int
    tokens: int
    parts: Mapping[str, float] = field(default_factory=dict)
    router: RouterCounts | None = None


class Stepper:
    """Trains the model of `parts` step by step.

    Args:
        args: The resolved config.
        parts: The model, its data and its objective.
        run: Folder of the run, which errors refer to.
        ranks: The ranks that share each batch.
        dtype: Dtype of the matrix products; weights stay in float32.
        profile_steps: Number of steps that are profiled.

    Raises:
        RequestError: If float16 is used without a CUDA device, or an option needs whole gradients
            together with `optimizer.in_backward`.
    """

    def __init__(
        self,
        args: TrainArgs,
        parts: RunParts,
        run: RunFolder,
        ranks: Ranks,
        dtype: torch.dtype,
        profile_steps: int = 0,
    ) -> None:
        self.args, self.run, self.ranks, self.dtype = args, run, ranks, dtype
        self.device, self.parts = ranks.device, parts
        self.model, self.tokenizer, self.objective = parts.model, parts.tokenizer, parts.objective
        self.data, self.batches = parts.data, parts.data.batches
        self.stage = stage_of(self.model)
        usable = dtype != torch.float16 or self.device.type == "cuda"
        expect(usable, "dtype", "float16", f"bfloat16 or float32 on {self.device.type}")
        # Only float16 overflows in the backward pass. For other dtypes the scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        args.optimizer.check_in_backward(
            args.accumulate, ranks=ranks.world_size, scaled=self.scaler.is_enabled()
        )
        width, kind = width_multiplier(self.model.args), self.device.type
        group = None if ranks.meshes is None else ranks.meshes.group("weights")
        self.optimizers = build_optimizer(
            self.model, args.optimizer, device_type=kind, width=width, group=group
        )
        self.ema = None if args.ema_decay is None else Ema(self.model, args.ema_decay)
        self.line = ProgressLine(quiet=not ranks.verbose)
        self.clock = StepClock(self.device, profile_steps)
        self.stop = StopRequest(alone=ranks.world_size == 1)
        self.progress = Progress()
        self.compiled = args.compile
        self._arrange_blocks()

    def _arrange_blocks(self) -> None:
        offloads = self.args.activation_offload and self.device.type != "cpu"
        arrange_blocks(
            self.model,
            compiled=self.compiled,
            checkpointing=self.args.activation_checkpoint,
            offload_min_bytes=OFFLOAD_MIN_BYTES if offloads else None,
        )

    def step(self) -> StepResult:
        """Take one optimizer step over this rank's share of the next global batch.

        If a signal interrupts it before the weights change, the state is that before the step.

        Raises:
            WorkError: If the loss or a gradient is not finite, or memory is exhausted.
        """
        self.model.train()
        position, random = self.batches.state, random_state(self.device)
        # Weights that have moved in the backward pass cannot be restored.
        redo = not isinstance(self.optimizers, BackwardOptimizers)
        try:
            micro_batches, totals = self._next_batch()
            progress = self.progress.step
            self.optimizers.set_scale(lr_scale(progress, self.args.steps, self.args.schedule))
            with self.stop.at_once() if redo else contextlib.nullcontext():
                sums = self._gradients(micro_batches, totals, redo=redo)
        except STOPS:
            self.batches.load_state(position)
            restore_random_state(self.device, random)
            self.optimizers.zero_grad()
            raise
        for total in sums.values():
            self.ranks.sum_parts(total)
        counts = {name: sums.pop(name) for name in RouterCounts._fields if name in sums}
        router = RouterCounts(**counts) if counts else None
        parts = dict(zip(sums, torch.stack([*sums.values()]).tolist(), strict=True))
        loss, tokens = parts.pop("loss"), int(totals.tokens)
        if not math.isfinite(loss):
            raise self._nonfinite(f"the loss is {loss}", micro_batches)
        with self.clock.part("optimizer"):
            grad_norm = self._apply(router, micro_batches)
        self.progress.step += 1
        self.progress.tokens += tokens
        row_length = max(micro.row_length for micro in micro_batches)
        return StepResult(loss, grad_norm, row_length, tokens, parts, router)

    def _next_batch(self) -> tuple[list[Batch], StepTotals]:
        """Return the micro-batches of the next step, and its totals over ranks."""
        with self.stop.at_once():
            with self.clock.part("data"):
                batch = self.batches.next()
            with self.clock.part("prepare"), torch.no_grad(), self._autocast(), self._eager():
                batch = self.objective.prepare(batch)
        short = self.progress.step < self.args.short_rows * self.args.steps
        if short:
            batch = batch.split_rows(self.args.short_rows_split)
        units = to_device(self.objective.units(batch).float(), self.device)
        tokens = to_device(torch.tensor(float(batch.real_tokens)), self.device)
        self.ranks.sum(units)
        self.ranks.sum(tokens)
        totals = StepTotals(units.clamp(min=1e-9), tokens)
        return list(batch.micro_batches(self.args.accumulate)), totals

    def _nonfinite(self, what: str, micro_batches: Sequence[Batch]) -> WorkError:
        """Return an error that names the place where numbers stopped being finite."""
        with torch.no_grad(), self._autocast():
            inputs = [micro.to(self.device).inputs() for micro in micro_batches]
            if self.stage is None:
                place = locate_nonfinite(self.model, inputs)
            else:  # the model can't run again: only stages without a bad weight would do so
                places = reversed(self.ranks.each(locate_nonfinite(self.model, [])))
                place = min(places, key=lambda one: (one == ALL_FINITE, "gradient" in one))
        return WorkError(f"step {self.progress.step + 1}: {what}; {place}; {self.run.untouched}")

    def _gradients(
        self, micro_batches: Sequence[Batch], totals: StepTotals, *, redo: bool = True
    ) -> dict[str, Tensor]:
        """Compute the gradients of this rank; without compiled blocks if compiling fails.

        Returns:
            The `loss` and other parts by name, summed over micro-batches.
        """
        random = random_state(self.device)
        try:
            return self._accumulate(micro_batches, totals)
        except (RequestError, WorkError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise WorkError(too_large(self.args, micro_batches[0], self.device)) from None
            if is_lost(error) or not self.compiled or not redo:
                raise
            notice(f"compile: failed ({one_line(error)}); the blocks run uncompiled")
        self.compiled = False
        self._arrange_blocks()
        self.optimizers.zero_grad()
        restore_random_state(self.device, random)
        return self._accumulate(micro_batches, totals)

    def _accumulate(self, micro_batches: Sequence[Batch], totals: StepTotals) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        if self.stage is not None:
            own = [self._own(micro) for micro in micro_batches]
            self.stage.run(own, lambda micro: self._forward(micro, totals, sums))
            return self.stage.join_sums(sums)
        for micro in micro_batches:
            _, loss = self._forward(self._own(micro), totals, sums)
            with self.clock.part("backward"):
                loss.backward()
        return sums

    def _own(self, micro: Batch) -> Batch:
        with self.clock.part("data"):
            return self.ranks.cut(micro.to(self.device))

    def _forward(
        self, micro: Batch, totals: StepTotals, sums: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the last hidden states, and the scaled loss of the layers of this rank.

        The parts of the loss are added to `sums`.
        """
        moe, ranks, stage = self.model.args.moe_args, self.ranks, self.stage
        with self._autocast(), self.clock.part("forward"), ranks.gathering(self.model):
            output = self.model(replace(micro.inputs(), logits="none"))
        with self._autocast(), self.clock.part("loss"):
            ends = stage is None or stage.last
            parts = self.objective.loss(output, micro, totals.units) if ends else {}
            loss = parts.get("loss", torch.zeros((), device=self.device))
            if moe is not None and output.router:
                tokens = totals.tokens if stage is None else totals.tokens / stage.mixture_share
                over_rows = ranks.over_tokens if ranks.divides_rows else None
                weighted, more = router_parts(output.router, moe, tokens, over_rows)
                loss, parts = loss + weighted, parts | more
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + part.detach()
        return output.hidden_BTD, self.scaler.scale(loss)

    def _reduced_norm(self) -> Tensor:
        """Sum the gradients over ranks and clip them; return their global norm before clipping."""
        weights, limit = list(self.model.parameters()), self.args.optimizer.max_grad_norm
        self.ranks.sum_gradients(weights)
        repeated = None if self.stage is None else self.stage.sum_shared()
        for optimizer in self.optimizers.all:
            self.scaler.unscale_(optimizer)
        if self.ranks.divided:
            return self.ranks.clip(weights, limit, repeated)
        return self.optimizers.clip(weights, limit)

    def _apply(self, router: RouterCounts | None, micro_batches: Sequence[Batch]) -> float:
        """Update the weights, and return the norm of the gradients before clipping.

        A step whose float16 gradients overflow changes no weight and is counted.
        """
        norm = float(self._reduced_norm())  # the device works on the update while the host goes on
        finite = math.isfinite(norm)
        if not finite and not self.scaler.is_enabled():
            raise self._nonfinite("the gradient is not finite", micro_batches)
        # All optimizers or none: clipping spreads an overflow over the gradients of all of them.
        if finite:
            for optimizer in self.optimizers.all:
                self.scaler.step(optimizer)
            self._follow(router)
        else:  # the scaler has looked at the gradients of this rank only
            for state in self.scaler._per_optimizer_states.values():
                state["found_inf_per_device"] = {self.device: torch.ones((), device=self.device)}
        self.scaler.update()
        self.progress.skipped_steps += not finite
        self.optimizers.zero_grad()
        return norm

    def _follow(self, router: RouterCounts | None) -> None:
        """Update what follows the weights: choice biases of experts, and their moving average."""
        moe, finetune = self.model.args.moe_args, self.args.finetune
        trains_router = finetune is None or finetune.trains_router
        if moe is not None and moe.balance == "bias" and router is not None and trains_router:
            own = slice(None) if self.stage is None else self.stage.mixtures
            update_choice_biases(self.model, router.picks_LE[own], moe.bias_update_rate)
        if self.ema is not None:
            self.ema.update(self.progress.step)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _eager(self) -> contextlib.AbstractContextManager[Any]:
        """Run blocks uncompiled: scoring and sampling have shapes of all kinds."""
        if not self.compiled:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    def dry_run(self) -> None:
        """Run forward and backward passes of the largest micro-batch, and print what they take.

        Weights, random state and position in the data do not change. Call it before the first step.

        Raises:
            RequestError: If a micro-batch does not fit into memory.
        """
        self.optimizers.paused = True
        micro = self.batches.largest(self.args.accumulate)
        random, started = random_state(self.device), time.perf_counter()
        reset_peak_memory(self.device)
        self.model.train()
        one = torch.ones((), device=self.device)
        # From the second micro-batch on, memory holds gradients as well. A stage of a pipeline also
        # keeps a micro-batch for each stage.
        most = 2 if self.stage is None else 1 + self.stage.count
        try:
            self._gradients([micro] * min(most, self.args.accumulate), StepTotals(one, one))
        except WorkError as error:
            raise RequestError(f"dry run: {error}") from None
        synchronize(self.device)
        restore_random_state(self.device, random)
        self.optimizers.zero_grad()
        self.optimizers.paused = False
        rows, length = micro.tokens.shape
        self.line.say(
            f"dry run: {rows} x {length} tokens forward and backward in "
            f"{time.perf_counter() - started:.1f} s, "
            f"peak memory {memory_bytes(self.device) / 1e9:.2f} GB"
        )
        reset_peak_memory(self.device)


def too_large(args: TrainArgs, micro: Batch, device: torch.device) -> str:
    """Return a message about a micro-batch that does not fit into memory, with what to change."""
    rows, length = micro.tokens.shape
    chunk = "automatic" if args.loss_chunk is None else args.loss_chunk
    return (
        f"a micro-batch of {rows} x {length} tokens does not fit into the memory of {device}; "
        f"expected a smaller data.batch_size (now {args.data.rows_per_step}), more accumulate "
        f"(now {args.accumulate}), activation_checkpoint = full (now {args.activation_checkpoint}) "
        f"or a smaller loss_chunk (now {chunk})"
    )
