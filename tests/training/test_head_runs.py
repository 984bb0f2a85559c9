"""The one loop trains heads: labels and embeddings are learnt, scored, saved and resumed."""

import json

import pytest

from tests.training.runs import losses, tiny_config
from tests.training.runs import tiny_args as tiny_run
from transom.base.errors import RequestError
from transom.checkpoints.load import load
from transom.data.labelled import read_labels
from transom.training.loop.setup import open_run
from transom.training.report.report import write_report

WORDS = ("alpha", "beta", "gamma", "delta")


def lines(kind, count=200):
    """Which word a text begins with: as a label, or as the pair's other text."""
    for i in range(count):
        word, rest = WORDS[i % 4], WORDS[(i * 7 // 3) % 4]
        yield {
            "text": f"{word} {i} {rest}",
            **({"label": word} if kind == "classification" else {"positive": word}),
        }


def config(folder, kind, *words, **changes):
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines(kind)))
    base = tiny_config(folder)
    model = {**base["model"], "head": {"kind": kind, "num_labels": 4, "pooling": "mean"}}
    data = {**base["data"], "sources": [str(file)], "batch_size": 8}
    return tiny_run(folder, "dtype=float32", *words, model=model, data=data, **changes)


def scores(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["held_out"] for row in rows if "held_out" in row]


@pytest.mark.parametrize("kind", ["classification", "embedding"])
def test_a_head_learns_and_the_run_is_a_model_folder(tmp_path, kind):
    trainer = open_run(
        config(tmp_path, kind, "steps=80", "eval_every=20", "save_every=20"), quiet=True
    )
    trainer.fit()
    told = scores(tmp_path / "run")
    assert told[-1]["accuracy"] > 0.9 and told[-1]["loss"] < told[0]["loss"]
    assert trainer.progress.best == min(one["loss"] for one in told)
    best = tmp_path / "run" / (tmp_path / "run" / "best").read_text().strip()
    assert load(best).args.head.kind == kind
    assert read_labels(best) == (sorted(WORDS) if kind == "classification" else None)
    assert write_report(tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["classification", "embedding"])
def test_a_resumed_head_goes_on_exactly(tmp_path, kind):
    open_run(config(tmp_path, kind, f"out={tmp_path}/straight"), quiet=True).fit()
    first = open_run(config(tmp_path, kind), quiet=True)
    while first.progress.step < 8:
        first.log(first.step(), 1.0)
    first.save(None)
    open_run(config(tmp_path, kind), resume=True, quiet=True).fit()
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert scores(tmp_path / "run") == scores(tmp_path / "straight")


def test_a_classifier_does_not_depend_on_accumulation(tmp_path):
    for count in (1, 4):
        open_run(
            config(tmp_path, "classification", f"accumulate={count}", f"out={tmp_path}/{count}"),
            quiet=True,
        ).fit()
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


def test_the_dry_run_takes_the_longest_rows_of_the_set(tmp_path):
    batches = open_run(config(tmp_path, "embedding"), quiet=True).batches
    seen = [batches.next().tokens.shape for _ in range(20)]
    state = batches.state
    assert batches.largest(1).tokens.shape == max(seen)
    assert batches.state == state


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("embedding", "accumulate=2"),
        ("classification", "short_rows=0.5"),
        ("classification", "sample_every=1"),
        ("embedding", "contrastive_temperature=0"),
    ],
)
def test_what_a_head_cannot_do_is_refused(tmp_path, kind, word):
    with pytest.raises(RequestError, match=f"{word.partition('=')[0]}: got .*; expected"):
        config(tmp_path, kind, word)
