"""Evaluate one model on data sets, or compare two models on the same data sets."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import RequestError, WorkError, expect, notice
from transom.base.runtime import machine
from transom.base.version import __version__
from transom.data.text.shards import Corpus, TokenFile
from transom.data.text.sources import SourceArgs
from transom.data.text.token_folder import open_corpus
from transom.evaluation.answers import score_answers
from transom.evaluation.bits import score_each
from transom.evaluation.choices import score_choices
from transom.evaluation.eval_args import EvalArgs
from transom.evaluation.eval_model import EvalModel
from transom.evaluation.intervals import CONFIDENCE, Ratio, difference, figure
from transom.evaluation.task_data import DataSet, TaskResult
from transom.planning.tables import counted

WINDOW = 4096  # tokens of context by default; the maximum of some models is slow
LOWER_IS_BETTER = {"bits_per_byte", "perplexity"}


def evaluate_models(
    names: Sequence[str | Path], data: Sequence[DataSet], args: EvalArgs, **opening: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate one model, or two models one after the other, as `transom eval` does.

    Args:
        names: Folder, run folder, adapter folder or hub id of each model.
        data: The data sets, from `open_data`.
        args: How to evaluate.
        **opening: Arguments of `EvalModel.open`.

    Returns:
        The document of `report` or `comparison`, and the result of every document or row.

    Raises:
        RequestError: A model or a data set does not fit.
        WorkError: A score is not finite.
    """
    facts, results, rows = [], [], []
    for name in names:
        model = EvalModel.open(name, **opening)
        results.append(evaluate(model, data, args))
        facts.append(model.facts())
        del model
        gc.collect()  # before the next model is loaded
        for one in results[-1]:
            rows += [{"model": str(name), "data": one.data.path, **row} for row in one.rows]
    if len(names) == 1:
        return report(facts[0], results[0]), rows
    return comparison((facts[0], facts[1]), results[0], results[1]), rows


def evaluate(model: EvalModel, data: Sequence[DataSet], args: EvalArgs) -> list[TaskResult]:
    """Score a model on every data set. Raise `WorkError` for a score that is not finite."""
    scorers = {"text": score_text, "choices": score_choices, "answers": score_answers}
    out = []
    for one in data:
        start = time.perf_counter()
        result = scorers[one.kind](model, one, args)
        for name, ratio in result.scores.items():
            if not math.isfinite(ratio.score):
                raise WorkError(f"{one.path}: {name} is not finite; try `transom verify`")
        out.append(replace(result, seconds=time.perf_counter() - start))
    return out


def score_text(model: EvalModel, data: DataSet, args: EvalArgs) -> TaskResult:
    """Compute bits per byte and perplexity of every document, its end token included.

    Raises:
        RequestError: The window is longer than the model's `max_seq_len`, or the text is too short.
    """
    tokenizer, longest = model.tokenizer, model.model.args.max_seq_len
    window = min(longest, WINDOW) if args.window is None else args.window
    expect(window <= longest, "window", window, f"1 to {longest}, the model's max_seq_len")
    stride = max(1, window // 2) if args.stride is None else args.stride
    corpus = open_corpus(SourceArgs(data.path), tokenizer, progress=args.progress)
    _notice_left_out(data.path, corpus)
    documents = _first(corpus.train, args.limit)
    each = score_each(
        model.model,
        documents,
        bos_id=tokenizer.bos_id if tokenizer.adds_bos else None,
        eos_id=tokenizer.eos_id,
        window=window,
        stride=stride,
        batch_tokens=args.batch_tokens,
        progress=data.path if args.progress else "",
    )
    nats = np.array([one.loss_sum for one in each])
    tokens = np.array([one.count for one in each])
    if not tokens.sum():
        raise RequestError(f"{data.path}: no token to predict; expected two tokens or more")
    sizes = np.array([one.bytes for one in each])
    scores = {
        "bits_per_byte": Ratio(nats / math.log(2), sizes),
        "perplexity": Ratio(nats, tokens, _exp),
    }
    facts = {
        "documents": len(each),
        "tokens": int(tokens.sum()),
        "bytes": int(sizes.sum()),
        "unknown_tokens": corpus.unknown_tokens,
        "window": window,
        "stride": stride,
    }
    rows = [
        {"id": id, "nats": one.loss_sum, "tokens": one.count, "bytes": one.bytes}
        for id, one in zip(documents.ids, each, strict=True)
    ]
    return TaskResult(data, corpus.sha256, scores, facts, rows)


def _exp(ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(np.minimum(ratio, 700.0))


def _first(documents: TokenFile, limit: int | None) -> TokenFile:
    if limit is None:
        return documents
    ids, sizes = documents.ids[:limit], documents.bytes[:limit]
    return replace(documents, ids=ids, bytes=sizes, offsets=documents.offsets[: len(ids) + 1])


def _notice_left_out(path: str, corpus: Corpus) -> None:
    counts = corpus.report.counts()
    if counts:
        notice(f"{path}: {counted(corpus.report.documents, 'document')} read; {', '.join(counts)}")
    if corpus.unknown_tokens:
        notice(
            f"{path}: the vocabulary has no tokens for {corpus.unknown_tokens} places, so the "
            "scores are too good"
        )


# -- documents -------------------------------------------------------------------------------------


def report(model: Mapping[str, Any], results: Sequence[TaskResult]) -> dict[str, Any]:
    """Return the results of one model as plain data. The interval of a single unit is None."""
    return {
        "model": model,
        "data": [{**_source(one), **_result(one)} for one in results],
        **_settings(),
    }


def comparison(
    models: tuple[Mapping[str, Any], Mapping[str, Any]],
    first: Sequence[TaskResult],
    second: Sequence[TaskResult],
) -> dict[str, Any]:
    """Return the results of two models on the same data, and the differences of their scores.

    Perplexities count tokens. Those of different vocabularies have no difference.

    Raises:
        WorkError: The data changed between the two models.
    """
    same_tokens = models[0]["tokenizer_hash"] == models[1]["tokenizer_hash"]
    data = []
    for a, b in zip(first, second, strict=True):
        if a.sha256 != b.sha256:
            raise WorkError(f"{a.data.path}: the data changed between the two models; run it again")
        names = [name for name in a.scores if same_tokens or name != "perplexity"]
        difference = {name: _difference(name, a.scores[name], b.scores[name]) for name in names}
        data.append({**_source(a), "a": _result(a), "b": _result(b), "difference": difference})
    return {"a": models[0], "b": models[1], "data": data, **_settings()}


def _source(one: TaskResult) -> dict[str, Any]:
    return {"path": one.data.path, "kind": one.data.kind, "sha256": one.sha256}


def _result(one: TaskResult) -> dict[str, Any]:
    scores = {name: figure(ratio) for name, ratio in one.scores.items()}
    return {"scores": scores, **one.facts, "seconds": round(one.seconds, 3)}


def _difference(name: str, first: Ratio, second: Ratio) -> dict[str, Any]:
    """Return `second - first`, and the better model if its interval does not contain zero."""
    found, better = difference(first, second), None
    low, high = found["low"], found["high"]
    if low is not None and high is not None and (low > 0 or high < 0):
        better = "b" if (low > 0) != (name in LOWER_IS_BETTER) else "a"
    return {**found, "better": better}


def _settings() -> dict[str, Any]:
    return {"confidence": CONFIDENCE, "versions": {"transom": __version__, **machine()}}
