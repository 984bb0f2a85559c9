"""The one training loop: pretraining, fine-tuning and preference tuning differ in what they hand to
it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from transom.base.errors import RequestError, WorkError, notice, require
from transom.base.interrupts import STOPS
from transom.base.runtime import (
    is_out_of_memory,
    matmul_peak,
    memory_bytes,
    reset_peak_memory,
    synchronize,
)
from transom.data.batch import Batch
from transom.evaluation.bits import HeldOut
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.config import TrainArgs
from transom.training.loop.blocks import OFFLOAD_MIN_BYTES, arrange_blocks
from transom.training.loop.checkpoint_writer import StepModel
from transom.training.loop.course import run_course
from transom.training.loop.dry_run import (
    random_state,
    random_states,
    restore_random_state,
    take_random_states,
    too_large,
)
from transom.training.loop.monitor import Monitor, Progress, Score, StepResult, lower_is_better
from transom.training.loop.nonfinite import blame
from transom.training.loop.profile import StepClock
from transom.training.loop.progress import ProgressLine, StopRequest
from transom.training.loop.ranks import Ranks
from transom.training.loop.run_data import RunData
from transom.training.loop.run_folder import RunFolder
from transom.training.losses.balance import RouterCounts, router_parts, update_choice_biases
from transom.training.losses.objectives import Objective
from transom.training.optim.ema import Ema
from transom.training.optim.mup import width_multiplier
from transom.training.optim.optimizers import BackwardOptimizers, Optimizers, build_optimizer
from transom.training.optim.schedule import lr_scale


class Whole(NamedTuple):
    """Of one step over all ranks: the units its loss is divided by, and its tokens that are no
    padding.
    """

    units: Tensor
    tokens: Tensor


class Sums(NamedTuple):
    """What micro-batches add up to: mean loss and its parts by name, and what routers did, if there
    are any.
    """

    parts: dict[str, Tensor]
    router: RouterCounts | None


@dataclass
class Trainer:
    """Trains `model` on `data` into `run`; rank, world size and mesh are told, never assumed to be
    one.
    """

    args: TrainArgs
    model: LLM
    tokenizer: Tokenizer
    data: RunData
    objective: Objective
    step_model: StepModel
    run: RunFolder
    device: torch.device
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
    quiet: bool = False
    profile_steps: int = 0
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        usable, kind = self.dtype != torch.float16 or self.device.type == "cuda", self.device.type
        require(
            usable, "dtype", "float16", f"valid only for training on CUDA devices, this is {kind}"
        )
        # Only float16 can overflow in the backward pass; the scaler is inert for the other dtypes.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        scaled = self.scaler.is_enabled()
        self.args.optimizer.check_in_backward(
            self.args.accumulate, ranks=self.world_size, scaled=scaled
        )
        self.batches, self.data_hashes = self.data.batches, self.data.hashes
        self.optimizers = self._build_optimizers()
        self.ema = None if self.args.ema_decay is None else Ema(self.model, self.args.ema_decay)
        self.line = ProgressLine(quiet=self.quiet or self.rank > 0)
        self.clock = StepClock(self.device, self.profile_steps)
        self.stop = StopRequest(alone=self.world_size == 1)
        self.ranks = Ranks(self.world_size, self.mesh, self.device, self.rank)
        run = self.run if self.rank == 0 else None
        self.monitor = Monitor(
            self.args,
            self.model,
            self.tokenizer,
            self.data,
            self.objective,
            run,
            self.line,
            self.progress,
        )
        self.compiled = self.args.compile
        self._arrange_blocks()

    def _build_optimizers(self) -> Optimizers:
        width = width_multiplier(self.model.args)
        return build_optimizer(
            self.model, self.args.optimizer, device_type=self.device.type, width=width
        )

    def _arrange_blocks(self) -> None:
        offloads = self.args.activation_offload and self.device.type != "cpu"
        arrange_blocks(
            self.model,
            compiled=self.compiled,
            checkpointing=self.args.activation_checkpoint,
            offload_min_bytes=OFFLOAD_MIN_BYTES if offloads else None,
        )

    # -- one step
    # -------------------------------------------------------------------------------------

    def step(self) -> StepResult:
        """One optimizer step over this rank's share of the next global batch.

        An interruption before the weights change leaves the trainer as it was before the step.
        """
        self.model.train()
        before = self.batches.state, random_state(self.device)
        try:
            batch, micro_batches, whole, sums = self._forward_and_backward()
        except STOPS:
            self.batches.load_state(before[0])
            restore_random_state(self.device, before[1])
            self.optimizers.zero_grad()
            raise
        for total in (*sums.parts.values(), None if sums.router is None else sums.router.values_LC):
            self.ranks.sum(total)
        parts = {name: float(value) for name, value in sums.parts.items()}
        loss = parts.pop("loss")
        if not math.isfinite(loss):
            raise WorkError(
                f"{self._at_fault(f'the loss is {loss}', micro_batches)}; {self.run.untouched}"
            )
        with self.clock.part("optimizer"):
            grad_norm = self._apply(sums.router, micro_batches)
        self.progress.step += 1
        self.progress.tokens += int(whole.tokens)
        return StepResult(loss, grad_norm, batch.row_length, int(whole.tokens), parts, sums.router)

    def _forward_and_backward(self) -> tuple[Batch, list[Batch], Whole, Sums]:
        """Compute the gradients of the next batch; return it, its micro-batches, their totals and
        their losses.
        """
        with self.stop.at_once(), self.clock.part("data"):
            with torch.no_grad(), self._autocast(), self._eager():
                prepared = self.objective.prepare(self.batches.next())
            batch = self._shortened(prepared)
        whole = self._whole(batch)
        self.optimizers.set_scale(lr_scale(self.progress.step, self.args.steps, self.args.schedule))
        redo = not isinstance(
            self.optimizers, BackwardOptimizers
        )  # it has changed weights, which cannot be undone
        micro_batches = list(batch.micro_batches(self.args.accumulate))
        with self.stop.at_once() if redo else contextlib.nullcontext():
            sums = self._gradients(micro_batches, whole, redo=redo)
        return batch, micro_batches, whole, sums

    def _shortened(self, batch: Batch) -> Batch:
        short = self.progress.step < self.args.short_rows * self.args.steps
        return batch.split_rows(self.args.short_rows_split) if short else batch

    def _whole(self, batch: Batch) -> Whole:
        """What the step has over all ranks: what every loss of the step is divided by."""
        units = self.objective.units(batch).to(self.device, torch.float32)
        whole = Whole(units, torch.tensor(float(batch.real_tokens), device=self.device))
        for count in whole:  # exact to 2^24
            self.ranks.sum(count)
        return whole._replace(units=units.clamp(min=1e-9))

    def _at_fault(self, what: str, micro_batches: Sequence[Batch]) -> str:
        with torch.no_grad(), self._autocast():
            found = blame(self.model, [micro.to(self.device).inputs() for micro in micro_batches])
        return f"step {self.progress.step + 1}: {what}; {found}"

    def _gradients(
        self, micro_batches: Sequence[Batch], whole: Whole, *, redo: bool = True
    ) -> Sums:
        """Gradients of this rank's micro-batches; once more without compiled blocks where compiling
        fails.
        """
        before = random_state(self.device)
        try:
            return self._accumulate(micro_batches, whole)
        except (RequestError, WorkError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise WorkError(too_large(self.args, micro_batches[0], self.device)) from None
            if not self.compiled or not redo:
                raise
            why = " ".join(str(error).split())[:160]
            notice(
                f"compile: failed ({type(error).__name__}: {why}); the blocks run uncompiled "
                f"from here on"
            )
        self.compiled = False
        self._arrange_blocks()
        self.optimizers.zero_grad()
        restore_random_state(self.device, before)
        return self._accumulate(micro_batches, whole)

    def _accumulate(self, micro_batches: Sequence[Batch], whole: Whole) -> Sums:
        sums = Sums({}, None)
        moe = self.model.args.moe_args
        for micro in micro_batches:
            with self.clock.part("data"):
                micro = micro.to(self.device)
            with self._autocast(), self.clock.part("forward"):
                output = self.model(replace(micro.inputs(), logits="none"))
            with self._autocast(), self.clock.part("loss"):
                parts = self.objective.loss(output, micro, whole.units)
                loss = parts["loss"]
                if moe is not None and output.router:
                    weighted, more = router_parts(output.router, moe, whole.tokens)
                    loss, parts = loss + weighted, {**parts, **more}
            with self.clock.part("backward"):
                self.scaler.scale(loss).backward()
            for name, part in parts.items():
                sums.parts[name] = sums.parts.get(name, 0.0) + part.detach()
            if output.router:
                counts = RouterCounts.of(output.router)
                sums = sums._replace(router=counts if sums.router is None else sums.router + counts)
        return sums

    def _apply(self, router: RouterCounts | None, micro_batches: Sequence[Batch]) -> float:
        """Sum gradients over ranks, clip, step; a step whose float16 gradients overflow is skipped
        and counted.
        """
        weights = [p for p in self.model.parameters() if p.grad is not None]
        for p in weights:
            self.ranks.sum(p.grad)
        for optimizer in self.optimizers.all:
            self.scaler.unscale_(optimizer)
        norm = self.optimizers.clip(weights, self.args.optimizer.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if not finite and not self.scaler.is_enabled():
            raise WorkError(
                f"{self._at_fault('the gradient is not finite', micro_batches)}; "
                f"{self.run.untouched}"
            )
        # All optimizers or none: clipping has spread one's overflow over the gradients of the
        # others.
        if finite:
            for optimizer in self.optimizers.all:
                self.scaler.step(optimizer)
            self._follow(router)
        self.scaler.update()
        self.progress.skipped_steps += not finite
        self.optimizers.zero_grad()
        return float(norm)

    def _follow(self, router: RouterCounts | None) -> None:
        """What moves after the weights: choice biases of experts, the average of the weights."""
        moe = self.model.args.moe_args
        frozen = self.args.finetune is not None and not self.args.finetune.trains_router
        if moe is not None and moe.balance == "bias" and router is not None and not frozen:
            update_choice_biases(self.model, router.picks_LE, moe.bias_update_rate)
        if self.ema is not None:
            self.ema.update(self.progress.step)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    # -- the run
    # --------------------------------------------------------------------------------------

    def dry_run(self) -> None:
        """Run the run's largest micro-batch forward and backward; raise `RequestError` if it does
        not fit.

        Weights, random state, data order and metrics are as before. Call it before `resume` and
        `fit`.
        """
        if isinstance(self.optimizers, BackwardOptimizers):
            self.optimizers.remove_hooks()  # or the backward pass would move weights
        micro = self.batches.largest(self.args.accumulate)
        before, started = random_state(self.device), time.perf_counter()
        reset_peak_memory(self.device)
        self.model.train()
        try:  # from the second micro-batch on, the gradients of the first are there as well
            one = torch.ones((), device=self.device)
            self._gradients([micro] * min(2, self.args.accumulate), Whole(one, one))
        except WorkError as error:
            raise RequestError(f"dry run: {error}") from None
        synchronize(self.device)
        restore_random_state(self.device, before)
        self.optimizers.zero_grad()
        if isinstance(self.optimizers, BackwardOptimizers):
            self.optimizers = self._build_optimizers()
        rows, length = micro.tokens.shape
        self.line.say(
            f"dry run: {rows} x {length} tokens forward and backward in "
            f"{time.perf_counter() - started:.1f} s, "
            f"peak memory {memory_bytes(self.device) / 1e9:.2f} GB"
        )
        reset_peak_memory(self.device)

    def fit(self) -> HeldOut:
        """Train to the last step, saving on the way; return the final held-out score.

        SIGINT, SIGTERM and SIGHUP (see `stop.signal`) end the run early: at once in work that can
        be repeated, and otherwise after the step. The run is saved then, and `resume` continues it.
        """
        if self.rank == 0:
            self.run.lock()
        matmul_peak(self.device.type, self.dtype)  # now, so that no step pays for measuring it
        try:
            with self.stop.listening(), self.monitor.board_open():
                return run_course(self)
        finally:
            self.run.release()

    @property
    def finished(self) -> bool:
        """Return whether all steps are done, or held-out scores no longer improve."""
        patience = self.args.patience
        early = patience is not None and self.progress.stale >= patience
        return early or self.progress.step >= self.args.steps

    def evaluate(self, max_tokens: int | None, key: str = "held_out") -> Score:
        """Held-out bits per byte and perplexity, per source and in all, logged under `key` and
        shown.
        """
        # Fine-tuning is scored as it is trained; text is scored in the weights' own precision, as
        # `eval` does.
        with self._as_saved(), self._autocast() if self.args.finetune else contextlib.nullcontext():
            return self.monitor.evaluate(max_tokens, key)

    def sample(self) -> None:
        """Draw and show what the model says to the run's prompts now."""
        with self._as_saved(), self._autocast():
            self.monitor.sample()

    def experts(self) -> None:
        """Log what each expert of a mixture is for."""
        with self._as_saved():
            self.monitor.experts()

    @contextlib.contextmanager
    def _as_saved(self) -> Iterator[None]:
        """The model as a checkpoint holds it: averaged weights, and no compiled blocks."""
        with self._eager(), contextlib.nullcontext() if self.ema is None else self.ema.swapped():
            yield

    def _eager(self) -> contextlib.AbstractContextManager[Any]:
        """No compiled blocks for shapes of all kinds."""
        if not self.compiled:
            return contextlib.nullcontext()
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance

    def log(self, result: StepResult, seconds: float) -> None:
        """Log a step that took `seconds`."""
        more: dict[str, Any] = {"learning_rates": self.optimizers.learning_rates()}
        if self.scaler.is_enabled():
            more["skipped_steps"] = self.progress.skipped_steps
        self.monitor.log(result, seconds, self.dtype, self.world_size, more)

    # -- state
    # ----------------------------------------------------------------------------------------

    def save(self, measured: Score | None) -> None:
        """Write a checkpoint; it becomes the best one if `measured` beats all that were measured
        before.
        """
        best = self.monitor.is_record(measured)
        if best:
            self.progress.best = lower_is_better(measured)
        random = random_states(self.ranks)
        if self.rank == 0:
            with self._as_saved():
                raw = {} if self.ema is None else self.ema.state_tensors()
                self.run.save_step(
                    self.progress.step,
                    self.step_model.write,
                    {
                        **self.optimizers.state_tensors(),
                        **self.step_model.tensors(),
                        **raw,
                        **random,
                    },
                    {
                        "progress": vars(self.progress),
                        "data": self.batches.state,
                        "scaler": self.scaler.state_dict(),
                    },
                    best=best,
                    keep_last=self.args.keep_last,
                )
        self.ranks.wait()

    def resume(self) -> None:
        """Continue from the run's latest step exactly: weights, optimizer, data position, random
        state.
        """
        folder, tensors, state = self.run.read_step("latest")
        self.step_model.restore(folder, tensors)
        self.progress = self.monitor.progress = Progress(**state["progress"])
        take_random_states(self.ranks, tensors, self.args.seed, self.progress.step)
        if self.ema is not None:
            self.ema.load_state_tensors(tensors)
        self.optimizers.load_state_tensors(tensors)
        self.batches.load_state(state["data"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.rank == 0:
            again = self.progress.unmeasured or self.progress.step == self.args.steps
            self.run.cut_metrics(self.progress.step, unmeasured=again)
        self.monitor.write({"event": "resumed"})
        notice(f"{folder}: resumed at step {self.progress.step} of {self.args.steps}")
