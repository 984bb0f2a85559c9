"""The checks by name; a later kind of comparison is one more entry here, its bugs are rows in
`bugs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transom.verify.attention import check_attention
from transom.verify.cache import check_cache
from transom.verify.checkpoint import check_checkpoint
from transom.verify.data import check_data
from transom.verify.findings import Finding
from transom.verify.finetune import check_finetune
from transom.verify.merge import check_merge
from transom.verify.model import check_model
from transom.verify.policy import check_policy
from transom.verify.resume import check_resume, check_step


@dataclass(frozen=True)
class Check:
    """A named set of comparisons; `run` yields findings one by one."""

    name: str
    what: str
    run: Callable[[], Iterator[Finding]]


CHECKS: dict[str, Check] = {
    one.name: one
    for one in (
        Check(
            "model", "logits and gradients against an oracle written from the formulas", check_model
        ),
        Check(
            "cache",
            "cached, chunked, rotating, padded and packed calls against one whole forward",
            check_cache,
        ),
        Check(
            "attention", "every backend against the float64 reference, on the CPU", check_attention
        ),
        Check("data", "packed rows and targets against the documents they came from", check_data),
        Check("step", "a step in micro-batches against the same step in one piece", check_step),
        Check(
            "checkpoint",
            "folders of every format against their own files, rewritten ones and transformers",
            check_checkpoint,
        ),
        Check(
            "merge",
            "adapters in the weights against adapters beside them, in memory and folders",
            check_merge,
        ),
        Check(
            "policy",
            "probabilities that answers are drawn with against those they are learnt from",
            check_policy,
        ),
        Check(
            "finetune",
            "what carries loss, what trains and with which gradient, stopped runs, the model "
            "without its adapter",
            check_finetune,
        ),
        Check("resume", "an interrupted run against a straight one, bit for bit", check_resume),
    )
}
