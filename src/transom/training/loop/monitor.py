"""What a run logs: a row of numbers and a line of text per step, held-out scores and samples.

A number that `Monitor.log` or an objective adds to its row of metrics.jsonl is drawn by the report
and by TensorBoard without another change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from transom.base.errors import WorkError
from transom.base.runtime import memory_bytes
from transom.distributed.pipeline import scored, stage_of
from transom.distributed.ranks import Ranks
from transom.evaluation.bits import first_documents, score_each
from transom.evaluation.experts import expert_tokens, token_row
from transom.evaluation.score import Score
from transom.inference.sampling import SamplingArgs
from transom.inference.text import complete
from transom.layers.inputs import TransformerInput
from transom.planning.counts import flops_per_token
from transom.training.config import TrainArgs
from transom.training.loop.progress import Progress, ProgressLine, duration
from transom.training.loop.run_folder import RunFolder
from transom.training.loop.run_parts import RunParts
from transom.training.loop.step import StepResult
from transom.training.losses.balance import health_row
from transom.training.report.tensorboard import TensorBoard

EXPERT_TOKENS = 20_000  # held-out tokens per source by which experts are described


class Monitor:
    """Writes to metrics.jsonl (rank 0 only), to TensorBoard if asked for, and to the progress line.

    Args:
        args: The resolved config.
        parts: The model, its tokenizer, data and objective.
        run: Folder of the run.
        line: The progress line.
        progress: The progress of the run, which the trainer updates.
        ranks: The ranks that share the work. Only rank 0 writes.
    """

    def __init__(
        self,
        args: TrainArgs,
        parts: RunParts,
        run: RunFolder,
        line: ProgressLine,
        progress: Progress,
        ranks: Ranks,
    ) -> None:
        self.args, self.run, self.line, self.progress = args, run, line, progress
        self.ranks = ranks
        self.model, self.tokenizer = parts.model, parts.tokenizer
        self.data, self.objective = parts.data, parts.objective
        self._board: TensorBoard | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics.jsonl at the present step."""
        row = {"step": self.progress.step, **row}
        if self.ranks.rank == 0:
            self.run.append_metrics(row)
        if self._board is not None:
            self._board.write(row)

    @contextmanager
    def board_open(self) -> Iterator[None]:
        """Copy rows that are written inside to TensorBoard, if the config says so."""
        if not self.args.tensorboard or self.ranks.rank:
            yield
            return
        self._board = TensorBoard(self.run.path, first_step=self.progress.step)
        try:
            yield
        finally:
            self._board.close()
            self._board = None

    def log(
        self, result: StepResult, seconds: float, peak_flops: float, more: Mapping[str, Any]
    ) -> None:
        """Log one step.

        Args:
            result: What the step did.
            seconds: Duration of the step.
            peak_flops: Floating-point operations per second that all ranks could do.
            more: Other numbers by name.
        """
        p, args = self.progress, self.args
        rate = result.tokens / seconds
        frozen = args.finetune is not None and args.finetune.method == "lora"
        flops = flops_per_token(self.model.args, result.row_length, training=True, frozen=frozen)
        mfu, memory = rate * flops / peak_flops, memory_bytes(self.ranks.device)
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
            f"step {p.step}/{args.steps}  loss {result.loss:.3f}  {rate:,.0f} tokens/s  "
            f"MFU {mfu:.0%}  memory {memory / 1e9:.1f} GB  eta {duration(left)}",
            final=p.step == args.steps,
        )

    def scores(self, max_tokens: int | None) -> dict[str, Score]:
        """Score this rank's share of the held-out items; return the score of each source.

        Text is scored in the first documents of each source with about `max_tokens` tokens.
        """
        held_out = self.data.held_out
        if not isinstance(held_out, Mapping):
            score = partial(self.objective.evaluate, self.ranks.share(held_out))
            apart = self.objective.generates
            return {"": score() if apart else scored(self.model, score)} if held_out else {}
        bos = self.tokenizer.bos_id if self.tokenizer.adds_bos else None
        eos, window = self.tokenizer.eos_id, self.args.data.seq_len
        scores = {}
        for name, file in held_out.items():
            chosen = self.ranks.share(first_documents(file, bos, eos, max_tokens))
            framed = partial(score_each, bos_id=bos, eos_id=eos, window=window, indices=chosen)
            each = scored(self.model, partial(framed, self.model, file))
            scores[name] = sum(each, Score())
        return scores

    def log_scores(self, scores: Mapping[str, Score], key: str) -> Score:
        """Log the scores of all sources under `key`, print and return the score of all items.

        Raises:
            WorkError: If the score is not finite: it could not be compared with later ones.
        """
        total = sum(scores.values(), Score())
        if not total.count:
            return total
        if not math.isfinite(total.value):
            what = f"the held-out score is {total.value}"
            raise WorkError(f"step {self.progress.step}: {what}; {self.run.untouched}")
        sources = {name: one.row() for name, one in scores.items() if name}
        self.write({key: total.row() | ({"sources": sources} if sources else {})})
        self.line.say(f"step {self.progress.step}: held out {total}")
        return total

    def is_record(self, score: Score | None) -> bool:
        """Return whether a score is better than all before it."""
        best = self.progress.best
        return score is not None and score.count > 0 and (best is None or score.value < best)

    def experts(self) -> None:
        """Log the most frequent tokens of each expert of a mixture, over held-out text."""
        texts = list(self._held_out_text(EXPERT_TOKENS))
        if self.model.args.moe_args is not None and texts:
            found, stage = expert_tokens(self.model, texts), stage_of(self.model)
            layers = found if stage is None else list(chain(*stage.joined(found)))
            self.write(token_row(layers, self.tokenizer))

    def _held_out_text(self, tokens: int) -> Iterator[TransformerInput]:
        """Yield the beginnings of held-out documents, about `tokens` tokens of each source."""
        held_out = self.data.held_out
        for file in held_out.values() if isinstance(held_out, Mapping) else ():
            left = tokens
            for index in range(len(file)):
                if left <= 0:
                    break
                document = file.document(index)[: self.args.data.seq_len]
                ids = torch.from_numpy(document.astype(np.int64))
                if len(ids):
                    yield TransformerInput(ids[None].to(self.ranks.device), logits="none")
                left -= len(ids)

    def sample(self) -> None:
        """Continue the prompts of the config, or answer them if the data are conversations."""
        prompts, template = self.args.sample_prompts, self.data.template
        inputs: list[Any] = list(prompts)
        if template is not None:
            inputs = [template.encode([{"role": "user", "content": text}]) for text in prompts]
        self.model.eval()
        rows = complete(
            self.model,
            self.tokenizer,
            inputs,
            max_new_tokens=min(self.args.sample_tokens, self.model.args.max_seq_len // 2),
            sampling=SamplingArgs(temperature=0.8),
            ends=self.data.stop_tokens if template is not None else (),
        )
        samples = [
            {"prompt": prompt, "text": row.text} for prompt, row in zip(prompts, rows, strict=True)
        ]
        self.write({"samples": samples})
        for one in samples:
            self.line.say(f"step {self.progress.step}: {one['prompt']!r} -> {one['text']!r}")
