"""What a run tells of itself: a row of numbers and a line of text per step, held-out scores,
samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from transom.base.errors import WorkError
from transom.base.runtime import matmul_peak, memory_bytes
from transom.evaluation.bits import HeldOut, score
from transom.evaluation.experts import expert_tokens, token_row
from transom.inference.sampling import SamplingArgs
from transom.inference.text import complete
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.planning.counts import flops_per_token
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.config import TrainArgs
from transom.training.loop.progress import ProgressLine, duration
from transom.training.loop.run_data import RunData
from transom.training.loop.run_folder import RunFolder
from transom.training.losses.balance import RouterCounts, health_row
from transom.training.losses.objectives import Measured, Objective
from transom.training.report.tensorboard import TensorBoard

EXPERT_TOKENS = 20_000  # held-out tokens per source that tell what each expert is for


Score = HeldOut | Measured


@dataclass
class Progress:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None  # lowest held-out score: bits per byte, or the loss of a head
    skipped_steps: int = 0
    stale: int = 0  # measurements since the best one
    unmeasured: bool = False  # a signal came before this step was scored and sampled


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss per target (nats), gradient norm before clipping, length of its
    rows (tokens), and how many tokens, all ranks together, were no padding.

    `parts` are what else the loss is made of, such as `aux_loss`; `router` counts what mixtures of
    experts did.
    """

    loss: float
    grad_norm: float
    row_length: int
    tokens: int
    parts: Mapping[str, float] = field(default_factory=dict)
    router: RouterCounts | None = None


@dataclass
class Monitor:
    """Measures `model` and writes to `run` (rank 0 only), to TensorBoard if asked for, and to the
    progress line.
    """

    args: TrainArgs
    model: LLM
    tokenizer: Tokenizer
    data: RunData
    objective: Objective
    run: RunFolder | None
    line: ProgressLine
    progress: Progress
    board: TensorBoard | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl, at the present step."""
        row = {"step": self.progress.step, **row}
        if self.run is not None:
            self.run.append_metrics(row)
        if self.board is not None:
            self.board.write(row)

    @contextmanager
    def board_open(self) -> Iterator[None]:
        """Rows written inside are mirrored in TensorBoard, where the config says so."""
        if not self.args.tensorboard or self.run is None:
            yield
            return
        self.board = TensorBoard(self.run.path, first_step=self.progress.step)
        try:
            yield
        finally:
            self.board.close()
            self.board = None

    def log(
        self,
        result: StepResult,
        seconds: float,
        dtype: torch.dtype,
        world_size: int,
        more: Mapping[str, Any],
    ) -> None:
        """The numbers of a step that took `seconds`, and `more`; the progress line moves on."""
        p, args, device = self.progress, self.args, self.model.device
        rate = result.tokens / seconds
        frozen = args.finetune is not None and args.finetune.method == "lora"
        flops = flops_per_token(self.model.args, result.row_length, training=True, frozen=frozen)
        mfu = rate * flops / world_size / matmul_peak(device.type, dtype)
        memory = memory_bytes(device)
        self.write(
            {
                "loss": result.loss,
                **result.parts,
                "grad_norm": result.grad_norm,
                "tokens": p.tokens,
                "tokens_per_second": rate,
                "mfu": mfu,
                "memory_bytes": memory,
                "seconds": p.seconds,
                **({} if result.router is None else health_row(result.router)),
                **more,
            }
        )
        left = p.seconds / p.step * (args.steps - p.step)
        self.line.show(
            f"step {p.step}/{args.steps}  loss {result.loss:.3f}  {rate:,.0f} tokens/s  MFU "
            f"{mfu:.0%}  memory {memory / 1e9:.1f} GB  eta {duration(left)}",
            final=p.step == args.steps,
        )

    def evaluate(self, max_tokens: int | None, key: str) -> Score:
        """Held-out scores per source and in all, written under `key` and shown, or the objective's
        own.
        """
        measured = self.objective.measure()
        if measured is not None:
            self._check(measured.loss)
            return self._say(measured)
        names = {
            name: score(
                self.model,
                file,
                bos_id=self.tokenizer.bos_id if self.tokenizer.adds_bos else None,
                eos_id=self.tokenizer.eos_id,
                window=self.args.data.seq_len,
                max_tokens=max_tokens,
            )
            for name, file in self.data.held_out.items()
        }
        total = sum(names.values(), HeldOut())
        if not total.tokens:
            return total
        self._check(total.bits_per_byte)
        self.write(
            {
                key: {
                    **_scores(total),
                    "sources": {name: _scores(one) for name, one in names.items()},
                }
            }
        )
        self.line.say(
            f"step {self.progress.step}: held out {total.bits_per_byte:.3f} bits per byte, "
            f"perplexity {total.perplexity:.1f} over {total.tokens:,} tokens"
        )
        return total

    def _check(self, score: float) -> None:
        """A score that is no number ends the run: it would be the best one for good, or never
        beaten.
        """
        if not math.isfinite(score):
            kept = "" if self.run is None else f"; {self.run.untouched}"
            raise WorkError(f"step {self.progress.step}: the held-out score is {score}{kept}")

    def _say(self, measured: Measured) -> Measured:
        self.write({measured.key: vars(measured)})
        self.line.say(f"step {self.progress.step}: held out {measured}")
        return measured

    def is_record(self, measured: Score | None) -> bool:
        """Whether a score is lower than all before it."""
        score = lower_is_better(measured)
        return (
            score is not None
            and math.isfinite(score)
            and (self.progress.best is None or score < self.progress.best)
        )

    def experts(self) -> None:
        """The tokens that each expert is for, over the first held-out text of every source;
        written.
        """
        texts = list(self._held_out_text(EXPERT_TOKENS))
        if self.model.args.moe_args is not None and texts:
            self.write(token_row(expert_tokens(self.model, texts), self.tokenizer))

    def _held_out_text(self, tokens: int) -> Iterator[TransformerInput]:
        """The beginning of each held-out document, about `tokens` per source."""
        device, window = self.model.device, self.args.data.seq_len
        for file in self.data.held_out.values():
            left = tokens
            for index in range(len(file)):
                if left <= 0:
                    break
                ids = torch.from_numpy(file.document(index)[:window].astype(np.int64))
                if len(ids):
                    yield TransformerInput(ids[None].to(device), logits="none")
                left -= len(ids)

    def sample(self) -> None:
        """What the model says to the run's prompts, written and shown."""
        prompts, sampling = self.args.sample_prompts, SamplingArgs(temperature=0.8)
        asked, ends = self._asked(prompts)
        count = min(self.args.sample_tokens, self.model.args.max_seq_len // 2)
        self.model.eval()
        rows = complete(
            self.model, self.tokenizer, asked, max_new_tokens=count, sampling=sampling, ends=ends
        )
        samples = [
            {"prompt": prompt, "text": row.text} for prompt, row in zip(prompts, rows, strict=True)
        ]
        self.write({"samples": samples})
        for one in samples:
            self.line.say(f"step {self.progress.step}: {one['prompt']!r} -> {one['text']!r}")

    def _asked(self, prompts: Sequence[str]) -> tuple[Sequence[str | list[int]], Sequence[int]]:
        """The prompts as the run's rows have them, and what ends an answer beside the EOS."""
        template = self.data.template
        if template is None:
            return prompts, ()
        return [
            template.encode([{"role": "user", "content": text}]) for text in prompts
        ], self.data.stop_tokens


def lower_is_better(measured: Score | None) -> float | None:
    """The number by which steps are compared, None where nothing was measured."""
    if isinstance(measured, HeldOut):
        return measured.bits_per_byte if measured.tokens else None
    return None if measured is None else measured.loss


def _scores(one: HeldOut) -> dict[str, float]:
    return {
        "bits_per_byte": one.bits_per_byte,
        "perplexity": one.perplexity,
        "tokens": one.tokens,
        "bytes": one.bytes,
    }
