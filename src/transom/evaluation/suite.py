"""An evaluation: data sets of three kinds, what one model scores on them, and how two models
differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import RequestError, WorkError, notice, require
from transom.base.files import sha256_of
from transom.base.runtime import machine
from transom.base.version import __version__
from transom.chat.fingerprint import template_hash
from transom.data.text.shards import Corpus, TokenFile, prepare
from transom.data.text.sources import SourceArgs
from transom.evaluation.answers import score_answers
from transom.evaluation.bits import score_each
from transom.evaluation.choices import score_choices
from transom.evaluation.eval_args import EvalArgs
from transom.evaluation.eval_model import EvalModel
from transom.evaluation.intervals import CONFIDENCE, Interval, Ratio, bootstrap_difference, interval
from transom.evaluation.task_data import DataSet, Kind

WINDOW = (
    4096  # tokens of context at most unless told: the whole of some models' own maximum is slow
)
LOWER_IS_BETTER = {"bits_per_byte", "perplexity"}


@dataclass(frozen=True, eq=False)
class Measured:
    """What a model scored on one data set; the units of every score, documents or rows, are those
    of `rows`.
    """

    path: str
    kind: Kind
    sha256: str  # of a .jsonl file of rows; of the ids and texts of documents, as in run.json
    scores: dict[str, Ratio]
    facts: dict[str, Any]  # counts and settings
    rows: list[dict[str, Any]]
    seconds: float


def evaluate(subject: EvalModel, data: Sequence[DataSet], args: EvalArgs) -> list[Measured]:
    """Score a model on every data set; scores that are no numbers are a `WorkError`."""
    out = []
    for one in data:
        start = time.perf_counter()
        match one.kind:
            case "text":
                measured = _text(subject, one, args)
            case "choices":
                measured = _choices(subject, one, args)
            case "answers":
                measured = _answers(subject, one, args)
        bad = [name for name, ratio in measured.scores.items() if not math.isfinite(ratio.score)]
        if bad:
            raise WorkError(
                f"{one.path}: {bad[0]} is no finite number; `transom verify` may tell what is wrong"
            )
        out.append(replace(measured, seconds=time.perf_counter() - start))
    return out


def _text(subject: EvalModel, data: DataSet, args: EvalArgs) -> Measured:
    """Bits per byte and perplexity: every token of every document once, its end token too."""
    tokenizer, longest = subject.tokenizer, subject.model.args.max_seq_len
    window = min(longest, WINDOW) if args.window is None else args.window
    require(
        window <= longest, "window", window, f"expected 1 to {longest}, the model's max_seq_len"
    )
    corpus = prepare(SourceArgs(data.path), tokenizer, progress=args.progress)
    _say_left_out(data.path, corpus)
    documents = _first(corpus.train, args.limit)
    stride = max(1, window // 2) if args.stride is None else args.stride
    bos_id = tokenizer.bos_id if tokenizer.adds_bos else None
    each = score_each(
        subject.model, documents, bos_id=bos_id, eos_id=tokenizer.eos_id, window=window,
        stride=stride,
        batch_tokens=args.batch_tokens, progress=_bar(data, args),
    )  # fmt: skip
    nats, tokens, sizes = (
        np.array([getattr(one, name) for one in each]) for name in ("nats", "tokens", "bytes")
    )
    if not tokens.sum():
        raise RequestError(f"{data.path}: no token to predict; expected text of two tokens or more")
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
    rows = [{"id": id, **asdict(one)} for id, one in zip(documents.ids, each, strict=True)]
    return Measured(data.path, data.kind, corpus.sha256, scores, facts, rows, 0.0)


def _bar(data: DataSet, args: EvalArgs) -> str:
    return data.path if args.progress else ""


def _exp(ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(np.minimum(ratio, 700.0))


def _first(documents: TokenFile, limit: int | None) -> TokenFile:
    if limit is None:
        return documents
    ids, sizes = documents.ids[:limit], documents.bytes[:limit]
    return replace(documents, ids=ids, bytes=sizes, offsets=documents.offsets[: len(ids) + 1])


def _say_left_out(path: str, corpus: Corpus) -> None:
    words = corpus.report.counts()
    if words:
        notice(f"{path}: {corpus.report.documents} documents read; {', '.join(words)}")
    if corpus.unknown_tokens:
        notice(
            f"{path}: the vocabulary cannot write {corpus.unknown_tokens} places, so the scores "
            f"are too good"
        )


def _choices(subject: EvalModel, data: DataSet, args: EvalArgs) -> Measured:
    found = score_choices(subject, data.choices, args.batch_tokens, _bar(data, args))
    if found.cut:
        notice(
            f"{data.path}: {found.cut} sequences lost their beginning, longer than "
            f"{subject.longest} tokens"
        )
    facts = {
        "rows": len(data.choices),
        "tokens": found.tokens,
        "ties": found.ties,
        "cut": found.cut,
    }
    rows = [
        {
            "id": row.id,
            "answer": row.answer,
            "logprobs": found.logprobs[at],
            **{name: int(chosen[at]) for name, chosen in found.chosen.items()},
        }
        for at, row in enumerate(data.choices)
    ]
    scores = {name: Ratio.of_right(right) for name, right in found.right.items()}
    return Measured(data.path, data.kind, sha256_of(Path(data.path)), scores, facts, rows, 0.0)


def _answers(subject: EvalModel, data: DataSet, args: EvalArgs) -> Measured:
    found = score_answers(
        subject,
        data.answers,
        max_new_tokens=args.max_new_tokens,
        matching=args.matching,
        stop=args.stop,
        progress=_bar(data, args),
    )
    facts = {
        "rows": len(data.answers),
        "tokens": found.tokens,
        "unfinished": found.unfinished,
        "nothing_extracted": sum(one is None for one in found.found),
        "max_new_tokens": args.max_new_tokens,
        "stop": list(args.stop),
        "extract": args.extract,
        "ignore_case": args.ignore_case,
    }
    if any(row.messages for row in data.answers) and subject.template is not None:
        facts["chat_template"] = subject.template.origin
        facts["chat_template_sha256"] = template_hash(subject.template)
    rows = [
        {
            "id": row.id,
            **({"reasoning": found.reasoning[at]} if found.reasoning[at] else {}),
            "text": found.texts[at],
            "found": found.found[at],
            "right": bool(found.right[at]),
        }
        for at, row in enumerate(data.answers)
    ]
    scores = {"exact_match": Ratio.of_right(found.right)}
    return Measured(data.path, data.kind, sha256_of(Path(data.path)), scores, facts, rows, 0.0)


# -- documents
# ----------------------------------------------------------------------------------------


def report(subject: Mapping[str, Any], measured: Sequence[Measured]) -> dict[str, Any]:
    """One model's results as plain data; an interval is None where there is one unit only."""
    data = [{**_source(one), **_result(one)} for one in measured]
    return {"model": subject, "data": data, **_settings()}


def comparison(
    subjects: tuple[Mapping[str, Any], Mapping[str, Any]],
    first: Sequence[Measured],
    second: Sequence[Measured],
) -> dict[str, Any]:
    """Two models' results on the same data, and what the second has more of each score.

    Perplexities count tokens, so those of different vocabularies have no difference that means
    anything.
    """
    same_tokens = subjects[0]["tokenizer_hash"] == subjects[1]["tokenizer_hash"]
    data = []
    for a, b in zip(first, second, strict=True):
        if a.sha256 != b.sha256:
            raise WorkError(f"{a.path}: the data changed between the two models, run it again")
        names = [name for name in a.scores if same_tokens or name != "perplexity"]
        difference = {name: _difference(name, a.scores[name], b.scores[name]) for name in names}
        data.append({**_source(a), "a": _result(a), "b": _result(b), "difference": difference})
    return {"a": subjects[0], "b": subjects[1], "data": data, **_settings()}


def _source(one: Measured) -> dict[str, Any]:
    return {"path": one.path, "kind": one.kind, "sha256": one.sha256}


def _result(one: Measured) -> dict[str, Any]:
    scores = {
        name: {"value": ratio.score, **_edges(interval(ratio))}
        for name, ratio in one.scores.items()
    }
    return {"scores": scores, **one.facts, "seconds": round(one.seconds, 3)}


def _difference(name: str, first: Ratio, second: Ratio) -> dict[str, Any]:
    """`second - first`; the better one is named where all of the interval is on its side of
    zero.
    """
    found = bootstrap_difference(first, second)
    better = None
    if found is not None and (found[0] > 0 or found[1] < 0):
        better = "b" if (found[0] > 0) != (name in LOWER_IS_BETTER) else "a"
    return {"value": second.score - first.score, **_edges(found), "better": better}


def _edges(found: Interval | None) -> dict[str, float | None]:
    return {"low": None, "high": None} if found is None else {"low": found[0], "high": found[1]}


def _settings() -> dict[str, Any]:
    return {"confidence": CONFIDENCE, "versions": {"transom": __version__, **machine()}}
