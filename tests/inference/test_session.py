"""A session's cache: an answer is the same whatever was in the cache before."""

import pytest

from tests.helpers import random_model, tiny_args
from transom.inference.sampling import SamplingArgs
from transom.inference.session import AnswerArgs, GrowingText, Session
from transom.tokenizers.training import byte_tokenizer

ROOM = 200


def opened(model):
    framing = GrowingText(byte_tokenizer())
    args = AnswerArgs(SamplingArgs(), max_tokens=12)
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
