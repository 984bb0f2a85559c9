"""The one training loop: pretraining, fine-tuning and preference tuning differ in what they hand to it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from transom.checkpoints.folders import read_args
from transom.checkpoints.load import read_state, save
from transom.data.batches import NO_TARGET, Batch, Batches
from transom.data.shards import TokenFile
from transom.errors import RequestError, WorkError, notice
from transom.evaluation.bits import HeldOut, score
from transom.generation.sampling import SamplingArgs
from transom.generation.text import complete
from transom.model import LLM, TransformerOutput
from transom.planning.counts import flops_per_token, parameters
from transom.runtime import DTYPES, matmul_peak, memory_bytes, synchronize
from transom.tokenizer import Tokenizer
from transom.training.config import TrainArgs
from transom.training.loss import balancing_loss, cross_entropy_sum, expert_load
from transom.training.optimizers import build_optimizer
from transom.training.profile import StepClock
from transom.training.progress import ProgressLine, StopRequest, duration
from transom.training.run_folder import RunFolder
from transom.training.schedule import lr_scale

UNTOUCHED = "the last checkpoint is untouched; try a lower learning rate"


@dataclass
class Progress:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_bits_per_byte: float | None = None
    skipped_steps: int = 0


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss per target (nats), gradient norm before clipping, expert load [L, E].

    `row_length` is the length of its rows in tokens.
    """

    loss: float
    aux_loss: float | None
    grad_norm: float
    row_length: int
    expert_load: list[list[float]] | None = None


@dataclass
class Trainer:
    """Trains `model` on `batches` into `run`; rank, world size and mesh are told, never assumed to be one."""

    args: TrainArgs
    model: LLM
    tokenizer: Tokenizer
    batches: Batches
    held_out: Mapping[str, TokenFile]
    run: RunFolder
    device: torch.device
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
    quiet: bool = False
    profile_steps: int = 0
    progress: Progress = field(default_factory=Progress)
    data_hashes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype == torch.float16 and self.device.type != "cuda":
            raise RequestError(
                f"dtype = 'float16': accepted for training on CUDA devices, this is {self.device.type}"
            )
        self.optimizers = build_optimizer(self.model, self.args.optimizer, device_type=self.device.type)
        # Only float16 can overflow in the backward pass; the scaler is inert for the other dtypes.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.line = ProgressLine(quiet=self.quiet or self.rank > 0)
        self.clock = StepClock(self.device, self.profile_steps)
        self.stop = StopRequest()

    # -- one step -------------------------------------------------------------------------------------

    def step(self) -> StepResult:
        """One optimizer step over this rank's share of the next global batch."""
        self.model.train()
        with self.clock.part("data"):
            batch = self._shortened(self.batches.next())
            targets = self._global_count(batch)
        loss, aux, load = self._accumulate(batch, targets)
        if not math.isfinite(loss):
            raise WorkError(f"step {self.progress.step + 1}: the loss is {loss}; {UNTOUCHED}")
        with self.clock.part("optimizer"):
            grad_norm = self._apply()
        self.progress.step += 1
        self.progress.tokens += batch.tokens.numel() * self.world_size
        return StepResult(loss, aux, grad_norm, batch.tokens.size(1), load)

    def _shortened(self, batch: Batch) -> Batch:
        until = self.args.short_rows * self.args.steps
        return batch.split_rows(self.args.short_rows_split) if self.progress.step < until else batch

    def _global_count(self, batch: Batch) -> Tensor:
        """Targets of the whole step over all ranks: what every loss of the step is divided by."""
        count = (batch.targets != NO_TARGET).sum().to(self.device)
        self._sum_over_ranks(count)
        return count.clamp(min=1)

    def _accumulate(self, batch: Batch, targets: Tensor) -> tuple[float, float | None, list[list[float]] | None]:
        """Gradients of all micro-batches; the step's mean loss, balancing loss and expert load."""
        total = torch.zeros((), device=self.device)
        aux_total = torch.zeros((), device=self.device)
        loads = []
        for micro in batch.micro_batches(self.args.accumulate):
            with self.clock.part("data"):
                micro = micro.to(self.device)
            with self._autocast(), self.clock.part("forward"):
                output = self.model(micro.inputs())
            with self.clock.part("loss"):
                loss, share, aux = self._loss(output, micro, targets)
            with self.clock.part("backward"):
                self.scaler.scale(loss).backward()
            total += share.detach()
            if aux is not None:
                aux_total += aux.detach()
                loads.append(expert_load(output.router))
        self._sum_over_ranks(total)
        if not loads:
            return float(total), None, None
        load = torch.stack(loads).mean(0) / self.world_size
        self._sum_over_ranks(aux_total)
        self._sum_over_ranks(load)
        return float(total), float(aux_total), load.tolist()

    def _loss(
        self, output: TransformerOutput, micro: Batch, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(what is differentiated, this micro-batch's share of the mean loss, and of the balancing loss)."""
        assert output.logits is not None, "training asks for all logits"
        share = cross_entropy_sum(output.logits, micro.targets) / targets
        moe = self.model.args.moe_args
        if moe is None or not output.router:
            return share, share, None
        weight = (micro.targets != NO_TARGET).sum() / targets
        aux = balancing_loss(output.router) * weight
        return share + moe.aux_loss_coef * aux, share, aux

    def _apply(self) -> float:
        """Sum gradients over ranks, clip, step; a step whose float16 gradients overflow is skipped and counted."""
        weights = [p for p in self.model.parameters() if p.grad is not None]
        for p in weights:
            self._sum_over_ranks(p.grad)
        for optimizer in self.optimizers.all:
            self.scaler.unscale_(optimizer)
        limit = self.args.optimizer.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(weights, math.inf if limit is None else limit)
        self.optimizers.set_scale(lr_scale(self.progress.step, self.args.steps, self.args.schedule))
        finite = bool(torch.isfinite(norm))
        if not finite and not self.scaler.is_enabled():
            raise WorkError(f"step {self.progress.step + 1}: the gradient is not finite; {UNTOUCHED}")
        # All optimizers or none: clipping has spread one's overflow over the gradients of the others.
        if finite:
            for optimizer in self.optimizers.all:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.progress.skipped_steps += not finite
        self.optimizers.zero_grad()
        return float(norm)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _sum_over_ranks(self, tensor: Tensor | None) -> None:
        if self.world_size > 1 and tensor is not None:
            dist.all_reduce(tensor, group=self._group)

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self.mesh is None else self.mesh.get_group()

    # -- the run --------------------------------------------------------------------------------------

    def fit(self) -> HeldOut:
        """Train to the last step, saving on the way; returns the final held-out score.

        SIGINT and SIGTERM finish the step, save and end the run early (`stop.signal` tells which).
        """
        args = self.args
        matmul_peak(self.device.type, self.dtype)  # now, so that no step pays for measuring it
        with self.stop.listening():
            while self.progress.step < args.steps and not self._asked_to_stop():
                self.clock.before_step()
                started = time.perf_counter()
                result = self.step()
                synchronize(self.device)
                seconds = time.perf_counter() - started
                self.progress.seconds += seconds
                self._log(result, seconds)
                if table := self.clock.after_step(self.run.path / "trace.json"):
                    self.line.say(table)
                self._now_and_then()
            if table := self.clock.close(self.run.path / "trace.json"):
                self.line.say(table)
            if self.stop.signal is not None:
                self.line.say(f"stopping at step {self.progress.step}; a second signal stops at once")
                self.save(None)
                return HeldOut()
            return self.finish()

    def _asked_to_stop(self) -> bool:
        """Whether any rank has caught a signal: all leave at the same step, or some would wait forever."""
        if self.world_size > 1:
            asked = torch.tensor(self.stop.signal or 0, device=self.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
            self.stop.signal = int(asked) or None
        return self.stop.signal is not None

    def finish(self) -> HeldOut:
        """Score all held-out text and save the last step."""
        self.save(None)  # first: a kill while scoring must not cost the last steps
        self.line.say("scoring held-out text ...")
        # The best step is chosen by the score that all steps have, over the same first documents.
        limited = self.args.eval_every > 0 and self.args.eval_tokens is not None
        measured = self.evaluate(self.args.eval_tokens) if limited else None
        final = self.evaluate(None, key="final" if limited else "held_out")
        self.save(measured or final)
        return final

    def _now_and_then(self) -> None:
        args, step = self.args, self.progress.step
        if step == args.steps:
            return
        measured = None
        if args.eval_every and step % args.eval_every == 0:
            measured = self.evaluate(args.eval_tokens)
        if args.sample_every and step % args.sample_every == 0:
            self.sample()
        if step % args.save_every == 0 or self._is_record(measured):
            self.save(measured)

    def _is_record(self, measured: HeldOut | None) -> bool:
        if measured is None or not measured.tokens:
            return False
        record = self.progress.best_bits_per_byte
        return record is None or measured.bits_per_byte < record

    def evaluate(self, max_tokens: int | None, key: str = "held_out") -> HeldOut:
        """Held-out bits per byte and perplexity, per source and in all, logged under `key` and shown."""
        names = {
            name: score(
                self.model,
                file,
                bos_id=self.tokenizer.bos_id,
                eos_id=self.tokenizer.eos_id,
                window=self.args.data.seq_len,
                max_tokens=max_tokens,
            )
            for name, file in self.held_out.items()
            if len(file)
        }
        total = sum(names.values(), HeldOut())
        if not total.tokens:
            return total
        self._write({key: {**_scores(total), "sources": {name: _scores(one) for name, one in names.items()}}})
        self.line.say(
            f"step {self.progress.step}: held out {total.bits_per_byte:.3f} bits per byte, "
            f"perplexity {total.perplexity:.1f} over {total.tokens:,} tokens"
        )
        return total

    def sample(self) -> None:
        """Draw and show what the model says to the run's prompts now."""
        prompts, sampling = self.args.sample_prompts, SamplingArgs(temperature=0.8)
        count = min(self.args.sample_tokens, self.model.args.max_seq_len // 2)
        self.model.eval()
        rows = complete(self.model, self.tokenizer, prompts, max_new_tokens=count, sampling=sampling)
        samples = [{"prompt": prompt, "text": row.text} for prompt, row in zip(prompts, rows, strict=True)]
        self._write({"samples": samples})
        for one in samples:
            self.line.say(f"step {self.progress.step}: {one['prompt']!r} -> {one['text']!r}")

    def _log(self, result: StepResult, seconds: float) -> None:
        p, args = self.progress, self.args
        rate = args.data.batch_size * args.data.seq_len / seconds
        flops = flops_per_token(self.model.args, result.row_length, training=True)
        mfu = rate * flops / self.world_size / matmul_peak(self.device.type, self.dtype)
        row: dict[str, Any] = {
            "loss": result.loss,
            "learning_rates": self.optimizers.learning_rates(),
            "grad_norm": result.grad_norm,
            "tokens": p.tokens,
            "tokens_per_second": rate,
            "mfu": mfu,
            "memory_bytes": memory_bytes(self.device),
            "seconds": p.seconds,
        }
        if result.aux_loss is not None:
            row |= {"aux_loss": result.aux_loss, "expert_load": result.expert_load}
        if self.scaler.is_enabled():
            row["skipped_steps"] = p.skipped_steps
        self._write(row)
        left = p.seconds / p.step * (args.steps - p.step)
        self.line.show(
            f"step {p.step}/{args.steps}  loss {result.loss:.3f}  {rate:,.0f} tokens/s  MFU {mfu:.0%}  "
            f"memory {row['memory_bytes'] / 1e9:.1f} GB  eta {duration(left)}",
            final=p.step == args.steps,
        )

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.rank == 0:
            self.run.append_metrics({"step": self.progress.step, **row})

    # -- state ----------------------------------------------------------------------------------------

    def save(self, measured: HeldOut | None) -> None:
        """Write a checkpoint; it becomes the best one if `measured` beats all that were measured before."""
        best = self._is_record(measured)
        if best and measured is not None:
            self.progress.best_bits_per_byte = measured.bits_per_byte
        if self.rank == 0:
            self.run.save_step(
                self.progress.step,
                self._write_model,
                {**self.optimizers.state_tensors(), "rng": torch.get_rng_state()},
                {
                    "progress": vars(self.progress),
                    "data": self.batches.state,
                    "scaler": self.scaler.state_dict(),
                },
                best=best,
                keep_last=self.args.keep_last,
            )
        if self.world_size > 1:
            dist.barrier(group=self._group)

    def _write_model(self, folder: Path) -> None:
        save(self.model, folder, tokenizer=self.tokenizer)

    def resume(self) -> None:
        """Continue from the run's latest step exactly: weights, optimizer, data position, random state."""
        folder, tensors, state = self.run.read_step("latest")
        if read_args(folder) != self.model.args:
            raise RequestError(f"{folder}: belongs to another model than the config describes")
        weights = read_state(folder, self.model.args, self.model)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        torch.set_rng_state(tensors.pop("rng"))
        self.optimizers.load_state_tensors(tensors)
        self.batches.load_state(state["data"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        if self.rank == 0:
            self.run.cut_metrics(self.progress.step)
            self._write({"event": "resumed"})
        notice(f"{folder}: resumed at step {self.progress.step} of {self.args.steps}")


def _scores(one: HeldOut) -> dict[str, float]:
    return {
        "bits_per_byte": one.bits_per_byte,
        "perplexity": one.perplexity,
        "tokens": one.tokens,
        "bytes": one.bytes,
    }


def describe_run(args: TrainArgs, model: LLM, dtype: torch.dtype, device: torch.device) -> str:
    """One line: what is about to be trained, where and in which precision."""
    names = {kind: name for name, kind in DTYPES.items()}
    count = parameters(model.args)
    tokens = args.steps * args.data.batch_size * args.data.seq_len
    return f"{count / 1e6:.2f} M parameters, {tokens:,} tokens in {args.steps} steps, {names[dtype]} on {device}"
