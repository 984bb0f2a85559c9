"""A session's cache: an answer is the same whatever was in the cache before."""

from dataclasses import replace

import pytest

from tests.helpers import random_model, tiny_args
from transom.inference.decode_args import DecodeArgs
from transom.inference.sampling import SamplingArgs
from transom.inference.session import AnswerArgs, GrowingText, Session
from transom.tokenizers.training import byte_tokenizer

ROOM = 200


def opened(model, **decode):
    framing = GrowingText(byte_tokenizer())
    args = AnswerArgs(SamplingArgs(), max_tokens=12, decode=DecodeArgs(**decode))
    return Session(model, framing.tokenizer, framing, args, ROOM)


def tokens(session, turn):
    answer = session.ask(turn)
    list(answer)
    session.keep(answer)
    return answer.completion.tokens


@pytest.mark.parametrize("pattern", [{}, {"sliding_window": 4}])
def test_a_conversation_that_begins_anew_answers_as_a_new_one(pattern):
    model = random_model(tiny_args(vocab_size=258, max_seq_len=256, **pattern))
    session = opened(model)
    for turn in ("hello there" * 8, "hello you", "other words"):
        session.framing.reset("")
        assert tokens(session, turn) == tokens(opened(model), turn)


@pytest.mark.parametrize(
    "pattern", [{"sliding_window": 4}, {"layer_pattern": "SF", "sliding_window": 4}]
)
def test_a_turn_that_a_ring_can_not_roll_back_to_continues_after_the_last_prompt(pattern, ran):
    """A template may render an answer of more tokens than the slack in another way."""
    model = random_model(tiny_args(vocab_size=258, max_seq_len=256, **pattern))
    session, beside = opened(model, prefill_step_size=16), opened(model, prefill_step_size=16)
    session.args = beside.args = replace(session.args, max_tokens=50)
    first = "a first turn of many words" * 3
    tokens(session, first)
    tokens(beside, first)
    for one in (session, beside):
        one.framing.ids = [*one.framing.ids[: len(first)], 5, 6, 7]
    beside.cache.reset()
    beside.cached, beside.prefixes = [], None
    expected = tokens(beside, "next")
    ran.clear()
    assert tokens(session, "next") == expected
    assert ran[0] < 16


@pytest.mark.parametrize("pattern", [{}, {"layer_pattern": "SF", "sliding_window": 4}])
def test_a_conversation_goes_on_from_a_file(pattern, tmp_path, ran):
    model, path = (
        random_model(tiny_args(vocab_size=258, max_seq_len=256, **pattern)),
        tmp_path / "chat",
    )
    session = opened(model, prompt_cache_file=str(path))
    tokens(session, "a first turn of many words")
    before = path.read_bytes()
    session.finish()
    assert path.read_bytes() != before, "the answer is in the file now"
    later = opened(model, prompt_cache_file=str(path))
    later.framing.ids = session.framing.ids
    ran.clear()
    assert tokens(later, "next") == tokens(session, "next")
    assert ran[0] <= len("next") + 2
