"""Text as it streams: whole characters, and stop strings wherever tokens are cut."""

import pytest

from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.inference import text as text_module
from transom.inference.stopping import StopStrings
from transom.inference.text import Completion, complete, stream_text
from transom.tokenizers.training import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def says(monkeypatch, tokenizer):
    """Pretend that the model continues each row with the ids given; returns the stream of them."""

    def build(rows, max_new_tokens=99, **options):
        def steps(*_, **__):
            return iter(ids if isinstance(ids, list) else [ids] for ids in rows)

        monkeypatch.setattr(text_module, "stream", steps)
        prompts = ["p"] * (len(rows[0]) if isinstance(rows[0], list) else 1)
        return stream_text(None, tokenizer, prompts, max_new_tokens=max_new_tokens, **options)

    return build


def test_characters_are_never_split(says, tokenizer):
    text = "aé👍🏽!"
    stream = says(tokenizer.encode(text), max_new_tokens=len(text.encode()))
    pieces = [piece for (piece,) in stream]
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.completions == [Completion(text, tokenizer.encode(text), "length")]


def test_a_cut_character_is_shown_at_the_end(says):
    assert [piece for (piece,) in says([ord("a"), *"é".encode()[:1]], max_new_tokens=2)] == [
        "a",
        "\ufffd",
    ]


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two three", ["two"], "one "),
        ("aab", ["ab"], "a"),
        ("abababac", ["abac"], "abab"),
        ("one", ["ones"], "one"),
        ("xabcde", ["abcde", "cd"], "xab"),
        ("xabcde", ["bcd", "abcd"], "x"),
        ("stop", ["stop"], ""),
        ("é\n\nb", ["\n\n"], "é"),
    ],
)
def test_stop_strings_do_not_depend_on_where_tokens_are_cut(text, stop, shown):
    for size in range(1, len(text) + 1):
        strings, pieces = StopStrings(stop), []
        for at in range(0, len(text), size):
            pieces.append(strings.push(text[at : at + size]))
            if strings.found:
                break
        assert "".join([*pieces, strings.finish()]) == shown


def test_text_that_may_become_a_stop_string_is_held_back(says):
    stream = says(list(b"a#b##c"), stop=["##"])
    assert [piece for (piece,) in stream] == ["a", "", "#b", "", ""]
    assert stream.completions == [Completion("a#b", list(b"a#b##"), "stop", "##")]


def test_rows_end_apart(says, tokenizer):
    eos = tokenizer.eos_id
    rows = [[97, 120, 49], [98, 46, 50], [eos, 121, 51], [None, 122, 52]]
    stream = says(rows, max_new_tokens=4, stop=["."], stop_tokens=[eos])
    assert list(stream) == [["a", "x", "1"], ["b", "", "2"], ["", "", "3"], ["", "", "4"]]
    first, second, third = stream.completions
    assert first == Completion("ab", [97, 98, eos], "stop")
    assert second == Completion("x", [120, 46], "stop", ".")  # its later tokens are nobody's
    assert third == Completion("1234", [49, 50, 51, 52], "length")


def test_the_stream_ends_when_every_row_has(says):
    steps = says(list(b"a.bcdef"), stop=["."])
    assert len(list(steps)) == 2


def test_an_id_without_a_token_is_shown_as_such(says):
    stream = says([97, 300, 98], max_new_tokens=3)
    assert [piece for (piece,) in stream] == ["a", "\ufffd", "b"]


def test_prompts_get_a_bos_and_ids_stay(tokenizer):
    model = random_model(tiny_args(vocab_size=258))
    bos_and_text = [tokenizer.bos_id, *tokenizer.encode("hi")]
    text, ids = complete(model, tokenizer, ["hi", bos_and_text], max_new_tokens=8)
    assert text == ids


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(RequestError, match="stop: got ''"):
        stream_text(None, tokenizer, ["a"], max_new_tokens=1, stop=[""])


EOS = "<|end_of_text|>"


def test_a_stop_string_that_is_a_control_token_ends_the_row_there(says, tokenizer):
    ids = [97, tokenizer.eos_id, 98]
    stream = says(ids, stop=[EOS])
    assert list(stream) == [["a"], [""]]
    assert stream.completions == [Completion("a", ids[:2], "stop", EOS)]


def test_a_stop_string_that_holds_a_control_token_is_found(says, tokenizer):
    eos = tokenizer.eos_id
    stop = [f"b{EOS}\n"]
    stream = says([97, 98, eos, 10, 99], stop=stop)
    assert "".join(piece for (piece,) in stream) == "a"
    assert stream.completions == [Completion("a", [97, 98, eos, 10], "stop", stop[0])]
    other = says([97, 98, eos, 99], max_new_tokens=4, stop=stop)  # something else comes behind it
    assert "".join(piece for (piece,) in other) == other.completions[0].text == "abc"


def test_kept_control_tokens_are_in_the_pieces_and_not_in_the_text(says, tokenizer):
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    for kept, shown in (
        ("all", "a<|begin_of_text|>b<|end_of_text|>"),
        ([eos], "ab<|end_of_text|>"),
        ((), "ab"),
    ):
        stream = says([97, bos, 98, eos], stop_tokens=[eos], kept=kept)
        assert "".join(piece for (piece,) in stream) == shown
        assert stream.completions == [Completion("ab", [97, bos, 98, eos], "stop")]


def test_run_returns_texts_with_the_control_tokens_that_are_kept(says, tokenizer):
    ids = [97, tokenizer.bos_id, 98, tokenizer.eos_id]
    for kept, text in (([tokenizer.bos_id], "a<|begin_of_text|>b"), ((), "ab")):
        stream = says(ids, stop_tokens=[tokenizer.eos_id], kept=kept)
        assert stream.run() == [Completion(text, ids, "stop")]
