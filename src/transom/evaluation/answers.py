"""Exact match: whether the answer that a model generates is one of the accepted ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transom.base.errors import RequestError, located
from transom.base.runtime import mixed_seed
from transom.chat.fingerprint import template_hash
from transom.chat.reasoning import find_markers, split
from transom.evaluation.bits import in_order
from transom.evaluation.eval_args import EvalArgs
from transom.evaluation.eval_model import EvalModel
from transom.evaluation.intervals import Ratio
from transom.evaluation.task_data import AnswerRow, DataSet, TaskResult
from transom.inference.loop import GREEDY
from transom.inference.sampling import SamplingArgs
from transom.inference.text import Completion, stream_text
from transom.layers.inputs import batches_by_length

CACHE_TOKENS = 1 << 15  # prompt and new tokens of all rows of a batch


def score_answers(model: EvalModel, data: DataSet, args: EvalArgs) -> TaskResult:
    """Generate an answer to every prompt greedily, and compare it with the accepted answers.

    Messages are written with the chat template. The reasoning in their answers is not compared.

    Raises:
        RequestError: A prompt and its answer are longer than the model's `max_seq_len`, or there
            are messages and no chat template.
    """
    prompts = [_prompt_ids(model, row) for row in data.answers]
    for row, ids in zip(data.answers, prompts, strict=True):
        if model.longest is not None and len(ids) + args.max_new_tokens > model.longest:
            raise RequestError(
                f"{row.id}: a prompt of {len(ids)} tokens and {args.max_new_tokens} new ones; "
                f"expected {model.longest} together, the model's max_seq_len"
            )
    template = model.template if any(row.messages for row in data.answers) else None
    markers = None if template is None else find_markers(template)
    completions = complete_prompts(
        model,
        prompts,
        max_new_tokens=args.max_new_tokens,
        stop=args.stop,
        stop_tokens=(*model.stop_tokens, *(() if template is None else template.stop_tokens)),
        kept=() if markers is None else markers.control_ids(model.tokenizer),
    )
    progress = data.path if args.progress else ""
    answers = in_order(completions, len(prompts), progress)
    rows: list[dict[str, Any]] = []
    for row, one in zip(data.answers, answers, strict=True):
        reasoning, text = split(one.text, markers if row.messages else None)
        answer = args.answer_in(text)
        result = {"text": text, "found": answer, "right": args.is_right(answer, row.answers)}
        rows.append({"id": row.id, **({"reasoning": reasoning} if reasoning else {}), **result})
    facts = {
        "rows": len(rows),
        "tokens": sum(len(one.tokens) for one in answers),
        "unfinished": sum(one.finish_reason == "length" for one in answers),
        "nothing_extracted": sum(row["found"] is None for row in rows),
        "max_new_tokens": args.max_new_tokens,
        "stop": list(args.stop),
        "extract": args.extract,
        "ignore_case": args.ignore_case,
    }
    if template is not None:
        facts["chat_template"] = template.origin
        facts["chat_template_sha256"] = template_hash(template)
    scores = {"exact_match": Ratio.of_right([row["right"] for row in rows])}
    return TaskResult(data, data.sha256, scores, facts, rows)


def _prompt_ids(model: EvalModel, row: AnswerRow) -> list[int]:
    if not row.messages:
        return model.tokenizer.encode_prompt(row.prompt)
    if model.template is None:
        raise RequestError(
            f'{row.id}: messages: this model has no chat template; expected "prompt"'
        )
    with located(row.id):
        ids = model.template.encode(row.messages)
    return ids


def complete_prompts(
    model: EvalModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    stop_tokens: Sequence[int],
    sampling: SamplingArgs = GREEDY,
    batch_rows: int | None = None,
    kept: Sequence[int] = (),
) -> Iterator[tuple[int, Completion]]:
    """Yield the index and the completion of each prompt, in batches of similar length.

    Every prompt has a random generator of its own, so its completion does not depend on its batch.

    Args:
        model: The model that completes.
        prompts: Token ids of each prompt.
        max_new_tokens: The most tokens of a completion.
        stop: Texts that end a completion.
        stop_tokens: Ids of tokens that end a completion.
        sampling: Greedy by default.
        batch_rows: The most rows of a batch; None is limited by memory only.
        kept: Ids of control tokens that stay in the texts.
    """
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for batch in batches_by_length(lengths, CACHE_TOKENS, batch_rows):
        texts = stream_text(
            model.model,
            model.tokenizer,
            [prompts[index] for index in batch],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seeds=[mixed_seed(sampling.seed, index) for index in batch],
            stop=stop,
            stop_tokens=tuple(dict.fromkeys(stop_tokens)),
            kept=kept,
        )
        yield from zip(batch, texts.run(), strict=True)
