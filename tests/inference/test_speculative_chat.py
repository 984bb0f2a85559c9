"""Speculative decoding in a chat and on the command line: the text of plain decoding."""

import json

import pytest

from tests.cli.conftest import call  # noqa: F401 - a fixture
from tests.cli.test_generate_cli import write_model
from tests.helpers import random_model, tiny_args
from tests.inference.test_speculate import Guesses
from transom.attention.sdpa import sdpa
from transom.inference.decode_args import DecodeArgs
from transom.inference.draft import DraftModel
from transom.inference.forward import prefill
from transom.inference.session import AnswerArgs, GrowingText, Session
from transom.models.llm import LLM
from transom.tokenizers.training import byte_tokenizer

KINDS = {"full": {}, "window": {"sliding_window": 8}}
TURNS = ("hello there hello there", "hello you", "there hello hello")


def model_of(kind, seed=0):
    args = tiny_args(vocab_size=258, max_seq_len=512, **KINDS[kind])
    return random_model(args, seed, std=0.3).double()


def opened(model, **changes):
    framing = GrowingText(byte_tokenizer())
    return Session(model, framing.tokenizer, framing, AnswerArgs(max_tokens=24, **changes), 400)


def conversation(model, **changes):
    """The tokens of every answer, and the tokens that the cache kept after each."""
    session, answers = opened(model, **changes), []
    for turn in TURNS:
        answer = session.ask(turn)
        list(answer)
        session.keep(answer)
        assert int(session.cache.lengths_B[0]) == session.cache.bound == len(session.cached)
        answers.append((answer.completion.tokens, list(session.cached)))
    return answers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["look-up", "draft"])
def test_turns_are_those_of_a_plain_chat(kind, way):
    model = model_of(kind)
    options = {"decode": DecodeArgs(prompt_lookup_num_tokens=9)}
    if way == "draft":
        options = {"draft": DraftModel(model_of(kind)), "decode": DecodeArgs(num_draft_tokens=5)}
    plain = conversation(model)
    assert conversation(model, **options) == plain
    # An answer that ends at a text in the middle of accepted tokens.
    text = byte_tokenizer().decode(plain[0][0][5:8])
    assert conversation(model, stop=[text], **options) == conversation(model, stop=[text])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [2, 5, 9, 14])
def test_an_interrupted_turn_is_continued(kind, at, monkeypatch):
    """Ctrl-C in one layer of a call that verifies proposals."""
    model, calls = model_of(kind), []
    plain = opened(model).ask(TURNS[0])
    list(plain)
    guesses = Guesses(plain.ids + plain.completion.tokens, wrong=range(30, 99, 7), vocab=258)

    def interrupted(*args):
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt
        return sdpa(*args)

    monkeypatch.setattr(LLM, "attend", staticmethod(interrupted))
    session = opened(model, draft=guesses)
    answer = session.ask(TURNS[0])
    with pytest.raises(KeyboardInterrupt):
        list(answer)
    session.keep(answer, interrupted=True)
    monkeypatch.undo()
    other = opened(model)
    other.framing.text, other.framing.ids = session.framing.text, session.framing.ids
    session.args = other.args  # decode as usual
    found, expected = (one.ask(TURNS[1]) for one in (session, other))
    list(found)
    list(expected)
    assert found.completion.tokens == expected.completion.tokens


def test_the_command_line_tells_how_many_were_accepted(call, tmp_path):  # noqa: F811
    write_model(tmp_path / "model")
    write_model(tmp_path / "draft", dim=16, n_layers=1)
    plain = call("generate", tmp_path / "model", "-p", "abcabcabc", "-m", 30)[1]
    words = ["generate", tmp_path / "model", "-p", "abcabcabc", "-m", 30, "--json"]
    for flags in (["--prompt-lookup-num-tokens", 5], ["--draft-model", tmp_path / "draft"]):
        code, out, err = call(*words, *flags)
        rates = json.loads(out.splitlines()[-1])
        assert code == 0 and out.startswith(plain)
        assert rates["accepted_tokens"] <= rates["drafted_tokens"]
        assert rates["drafted_tokens"] or "--draft-model" in flags  # which may lack confidence
        assert f"Drafts: {rates['drafted_tokens']} tokens, {rates['accepted_tokens']} acc" in err


def test_the_step_size_of_the_prefill_is_that_of_the_draft_model_too(call, tmp_path, monkeypatch):  # noqa: F811
    """A long prompt must not take the memory of one call in the draft model."""
    write_model(tmp_path / "model")
    sizes = []

    def counted(model, cache, rows, step_size, runner=None):
        sizes.append(step_size)
        return prefill(model, cache, rows, step_size, runner)

    monkeypatch.setattr("transom.inference.draft.prefill", counted)
    words = ["generate", tmp_path / "model", "-p", "abcabcabc", "-m", 4]
    code = call(*words, "--draft-model", tmp_path / "model", "--prefill-step-size", 3)[0]
    assert code == 0
    assert set(sizes) == {3}


@pytest.mark.parametrize("verb", [["generate", "-p", "a"], ["chat"]])
def test_a_draft_model_of_another_vocabulary_is_refused(call, tmp_path, verb):  # noqa: F811
    write_model(tmp_path / "model")
    write_model(tmp_path / "draft", vocab_size=300)
    byte_tokenizer().with_special(["<new>"]).save(tmp_path / "draft")
    words = [*verb, tmp_path / "model", "--draft-model"]
    code, out, err = call(*words, tmp_path / "draft")
    assert (code, out) == (2, "")
    assert "draft model's vocabulary: got 259; expected the model's 258" in err
    assert call(*words, tmp_path / "nothing")[0] == 2
