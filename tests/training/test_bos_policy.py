"""Documents of a run begin as the tokenizer's makers begin a text, and always end."""

from itertools import pairwise

import pytest

from tests.training.runs import tiny_args as tiny_run
from tests.training.runs import tiny_config, without_bos
from transom.distributed.ranks import Ranks
from transom.tokenizers.training import byte_tokenizer
from transom.training.loop import monitor
from transom.training.loop.run_data import open_data
from transom.training.loop.setup import open_run


@pytest.mark.parametrize("adds", [True, False])
def test_packed_documents_begin_by_the_policy_and_end_with_eos(tmp_path, adds):
    args = tiny_run(tmp_path)
    tokenizer = byte_tokenizer() if adds else without_bos(tmp_path / "tokenizer")
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert bos is not None and tokenizer.adds_bos == adds
    model_args = args.model_args(tokenizer.vocab_size)
    data = open_data(args, model_args, tokenizer, Ranks(quiet=True))
    rows = [row for _ in range(20) for row in data.batches.next().tokens.tolist()]
    begins = [second for row in rows for first, second in pairwise(row) if first == eos]
    assert (
        len(begins) > 5
        and (set(begins) == {bos}) == adds
        and any(bos in row for row in rows) == adds
    )


def test_held_out_documents_are_scored_by_the_same_policy(tmp_path, monkeypatch):
    without_bos(tmp_path / "tokenizer")
    kind = {"kind": "file", "path": str(tmp_path / "tokenizer")}
    seen, score_each = [], monitor.score_each

    def spy(*args, **named):
        seen.append((named["bos_id"], named["eos_id"]))
        return score_each(*args, **named)

    monkeypatch.setattr(monitor, "score_each", spy)
    trainer = open_run(
        tiny_run(tmp_path, **{**tiny_config(tmp_path), "tokenizer": kind, "steps": 1}), quiet=True
    )
    trainer.fit()
    assert set(seen) == {(None, trainer.tokenizer.eos_id)}
