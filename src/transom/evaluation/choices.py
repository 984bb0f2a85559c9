"""Multiple choice: which continuation of a prompt is most likely, as in lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from transom.base.errors import RequestError, WorkError, notice
from transom.evaluation.bits import Window, score_windows
from transom.evaluation.eval_args import EvalArgs
from transom.evaluation.eval_model import EvalModel
from transom.evaluation.intervals import Ratio
from transom.evaluation.task_data import DataSet, TaskResult

DELIMITER = " "  # between prompt and choice; `target_delimiter` of the harness
# What the log-probability of a choice is divided by, for each measure.
MEASURES: dict[str, Callable[[str], int]] = {
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}


def score_choices(model: EvalModel, data: DataSet, args: EvalArgs) -> TaskResult:
    """Score every choice of every row as a continuation of its prompt.

    `acc` takes the choice of the greatest log-probability. `acc_norm` divides the log-probability
    by the characters of the choice, `acc_bytes` by its UTF-8 bytes; the space before the choice is
    not counted (`process_results` of lm_eval/api/task.py). The first of equal choices counts.

    Raises:
        RequestError: A choice adds no token, or has more tokens than the model takes.
        WorkError: A log-probability is NaN.
    """
    pairs = [
        encode_pair(model, row.prompt, DELIMITER + choice, row.id)
        for row in data.choices
        for choice in row.choices
    ]
    windows = [continuation_window(context, rest, model.longest) for context, rest in pairs]
    lengths = [len(context) + len(rest) for context, rest in pairs]
    cut = sum(len(w.inputs) + 1 < length for w, length in zip(windows, lengths, strict=True))
    if cut:
        notice(
            f"{data.path}: {cut} sequences of more than {model.longest} tokens lost their beginning"
        )
    progress = data.path if args.progress else ""
    scores = iter(score_windows(model.model, windows, args.batch_tokens, progress))
    rows: list[dict[str, Any]] = []
    ties = 0
    for row in data.choices:
        logprobs = [-next(scores).nats for _ in row.choices]
        if any(map(math.isnan, logprobs)):
            raise WorkError(
                f"{row.id}: the log-probability of a choice is NaN; try `transom verify`"
            )
        ties += logprobs.count(max(logprobs)) > 1
        chosen = {}
        for name, size in MEASURES.items():
            sizes = map(size, row.choices)
            chosen[name] = int(np.argmax([a / b for a, b in zip(logprobs, sizes, strict=True)]))
        rows.append({"id": row.id, "answer": row.answer, "logprobs": logprobs, **chosen})
    right = {
        name: Ratio.of_right([row[name] == row["answer"] for row in rows]) for name in MEASURES
    }
    tokens = sum(len(rest) for _, rest in pairs)
    facts = {"rows": len(rows), "tokens": tokens, "ties": ties, "cut": cut}
    return TaskResult(data, data.sha256, right, facts, rows)


def encode_pair(
    model: EvalModel, context: str, continuation: str, where: str
) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of its continuation.

    Both are encoded as one text, which is then divided after as many tokens as the context alone
    has. If a token spans the boundary, the scored part is not exactly the continuation. Spaces at
    the end of the context belong to the continuation. The harness does the same (`_encode_pair` of
    lm_eval/api/model.py).
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if stripped:
        head = model.tokenizer.encode_prompt(stripped)
        ids = model.tokenizer.encode_prompt(stripped + continuation)
    else:
        head = [] if model.prefix is None else [model.prefix]
        ids = head + model.tokenizer.encode(continuation)
    if not head or len(ids) <= len(head):
        raise RequestError(
            f"{where}: {continuation!r} adds no token to the {len(head)} of the prompt; expected "
            "text that does"
        )
    return head, ids[len(head) :]


def continuation_window(
    context: Sequence[int], continuation: Sequence[int], longest: int | None
) -> Window:
    """Return the forward pass that scores a continuation.

    Tokens at the start are cut if the input has more than `longest` tokens (None: no limit).
    """
    ids = np.array([*context, *continuation], dtype=np.int64)
    if longest is not None:
        if len(continuation) > longest:
            raise RequestError(
                f"tokens of a continuation: got {len(continuation)}; expected {longest} or fewer"
            )
        ids = ids[-(longest + 1) :]
    return Window(ids[:-1], ids[1:], len(ids) - 1 - len(continuation))
