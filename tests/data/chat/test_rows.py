"""Examples as rows: what carries loss, what is cut, dropped and counted."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.chat.chat_texts import PUBLISHED, say
from tests.tokenizers.makers import sentencepiece_model
from transom.base.errors import Problem, RequestError
from transom.chat.built_in import named
from transom.chat.template import ChatTemplate
from transom.data.chat.conversations import ChatExample, example_of
from transom.data.chat.rows import (
    ChatEncoder,
    EncodedChats,
    prompt_ids,
    template_for,
)
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import byte_tokenizer, train_bpe

TOKENIZER = byte_tokenizer()
BOS, EOS = 256, 257
PLAIN = ChatTemplate(named("plain").source(TOKENIZER), TOKENIZER)
Q, A = say("user", "q"), say("assistant", "abc")


def chat(*messages: dict[str, Any], **more: Any) -> ChatExample:
    return ChatExample("f:1", "chat", messages or (Q, A), **more)


def bare(kind: Any = "completion", *answers: str, **more: Any) -> ChatExample:
    said = tuple((say("assistant", one),) for one in answers or ("abc",))
    return ChatExample("f:2", kind, (Q,), said, bare=True, **more)


def encode(
    *examples: ChatExample, template: ChatTemplate | None = PLAIN, seq_len: int = 64, **more: Any
) -> EncodedChats:
    problems = more.pop("problems", None)
    encoded = ChatEncoder(TOKENIZER, template, seq_len, **more).encode(examples, problems)
    if problems is None:
        encoded.check()
    return encoded


def learnt(encoded: EncodedChats) -> list[str]:
    """What each row is to say."""
    rows = [row for item in encoded.items for row in item]
    return [TOKENIZER.decode(row.ids[row.weights > 0], skip_special=False) for row in rows]


def test_kinds_of_examples_and_what_of_them_carries_loss() -> None:
    assert learnt(encode(chat())) == ["abc<|end_of_text|>"]
    assert learnt(encode(bare())) == ["abc<|end_of_text|>"]
    assert learnt(encode(ChatExample("f:3", "text", text="xyz"))) == ["xyz<|end_of_text|>"]
    # Without a template texts are plain text; with one they are turns.
    (plain,), (turns,) = encode(bare(), template=None).items[0], encode(bare()).items[0]
    assert plain.ids.tolist() == [BOS, *b"qabc", EOS] and plain.weights.tolist() == [
        0,
        0,
        1,
        1,
        1,
        1,
    ]
    assert turns.ids.tolist() == PLAIN.encode([Q, A], add_generation_prompt=False)
    assert (plain.ids.dtype, plain.weights.dtype) == (np.int32, np.float32)


def test_everything_carries_loss_when_asked_for() -> None:
    for example, template in ((chat(), PLAIN), (bare(), PLAIN), (bare(), None)):
        (row,) = encode(example, template=template, train_on="all").items[0]
        assert row.weights.tolist() == [0.0, *[1.0] * (len(row.ids) - 1)]
    with pytest.raises(RequestError, match=r"f:1: weight: got 0.5; expected 1 for every message"):
        encode(chat(Q, {**A, "weight": 0.5}), train_on="all")


def test_weights_of_examples_and_messages_multiply() -> None:
    (row,) = encode(chat(Q, {**A, "weight": 0.5}, weight=3.0)).items[0]
    assert set(row.weights.tolist()) == {0.0, 1.5}
    assert encode(chat(Q, {**A, "weight": 0.0}, Q, A)).counts["trained_tokens"] == 4


def test_pairs_share_their_prompt_and_learn_their_answers() -> None:
    encoded = encode(bare("pair", "good", "bad"))
    ((chosen, rejected),) = encoded.items
    assert (
        encoded.rows_per_item == 2
        and encoded.counts["rows"] == 2
        and encoded.counts["examples"] == 1
    )
    assert learnt(encoded) == ["good<|end_of_text|>", "bad<|end_of_text|>"]
    starts = [int(np.flatnonzero(row.weights)[0]) for row in (chosen, rejected)]
    assert starts[0] == starts[1]
    assert (
        chosen.ids[: starts[0]].tolist() == rejected.ids[: starts[0]].tolist() == PLAIN.encode([Q])
    )


def test_pairs_of_the_same_tokens_are_left_out_and_counted() -> None:
    trimmed, same_start = bare("pair", "good", "good "), bare("pair", "good", "goose")
    strip = ChatTemplate(
        PUBLISHED["zephyr"].replace("message['content']", "message['content'] | trim"), TOKENIZER
    )
    encoded = encode(trimmed, same_start, template=strip)
    assert (len(encoded.items), encoded.counts["alike"], encoded.counts["rows"]) == (1, 1, 2)
    assert "1 pair left out" in str(encoded)
    cut = len(PLAIN.encode([Q])) + 2
    assert encode(trimmed, same_start, bare("pair", "x", "y"), seq_len=cut).counts["alike"] == 2
    with pytest.raises(RequestError, match=r"nothing to train on .*1 pair left out"):
        encode(same_start, seq_len=cut)


def test_answers_that_would_share_a_token_with_their_prompt_are_counted() -> None:
    tokenizer = train_bpe(["Answer: yes yes yes no " * 20], 269)
    text = ChatExample(
        "f:1",
        "completion",
        ({**Q, "content": "Answer: "},),
        ((say("assistant", "yes"),),),
        bare=True,
    )
    word = ChatExample(
        "f:1",
        "completion",
        ({**Q, "content": "Answer:"},),
        ((say("assistant", " yes"),),),
        bare=True,
    )
    encoded = ChatEncoder(tokenizer, None, 64).encode([text, word])
    assert encoded.counts["apart"] == 1 and "1 answer tokenized separately" in str(encoded)


def test_tokens_for_text_that_the_vocabulary_lacks_are_counted(tmp_path) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes(sentencepiece_model(byte_fallback=False))
    encoded = ChatEncoder(Tokenizer.load(tmp_path), None, 64).encode([bare("completion", "do 🦜")])
    assert encoded.counts["unknown"] == 1 and "1 unknown token, for text" in str(encoded)


def test_a_shared_prompt_and_its_answers_are_the_tokens_of_the_whole_text() -> None:
    text = (
        "the sky is blue, the sea is black; 12 birds\n\tsing (softly) and\n\nfly  away. 天气很好 "
    )
    tokenizer = train_bpe([text * 3], 300)
    words = re.findall(r"\s*\S+", text)
    for at in range(1, len(words)):
        chosen, rejected = "".join(words), "".join([*words[:at], words[at][:-1] + "q?"])
        pair = example_of({"chosen": chosen, "rejected": rejected}, "f:1")
        ((one, other),) = ChatEncoder(tokenizer, None, 500).encode([pair]).items
        for row, whole in ((one, chosen), (other, rejected)):
            assert row.ids.tolist() == tokenizer.encode(whole, add_bos=True, add_eos=True)


def test_earlier_answers_of_a_prompt_carry_no_loss() -> None:
    talk = ChatExample(
        "f:1", "pair", (Q, A, Q), ((say("assistant", "x"),), (say("assistant", "y"),))
    )
    assert learnt(encode(talk)) == ["x<|end_of_text|>", "y<|end_of_text|>"]


def test_a_completion_alone_is_learnt_also_behind_a_conversation() -> None:
    earlier = (Q, say("assistant", "earlier"), say("user", "again"))
    example = ChatExample("f:3", "completion", earlier, ((A,),))
    assert learnt(encode(example)) == ["abc<|end_of_text|>"]


def test_labels_go_with_their_items() -> None:
    encoded = encode(*(bare("label", "abc", label=one) for one in (True, False)))
    assert encoded.compared and [item[0].label for item in encoded.items] == [True, False]
    # one is left out, and its label with it
    encoded = encode(
        bare("label", "a" * 90, label=True), bare("label", label=False), truncate="drop"
    )
    assert [item[0].label for item in encoded.items] == [False] and encoded.counts["dropped"] == 1


def test_long_examples_are_cut_at_their_end_or_dropped_and_counted() -> None:
    whole = len(encode(chat()).items[0][0].ids)
    cut = encode(chat(), seq_len=whole - 2)
    assert learnt(cut) == ["ab"]
    assert cut.counts == Counter(
        examples=1, rows=1, tokens=whole - 2, trained_tokens=2, truncated=1, without_end=1
    )
    assert encode(chat(), seq_len=whole).counts == Counter(
        examples=1, rows=1, tokens=whole, trained_tokens=4
    )
    # An answer that is cut away as a whole is no answer without an end.
    assert encode(chat(Q, A, Q, A), seq_len=whole).counts == Counter(
        examples=1, rows=1, tokens=whole, trained_tokens=4, truncated=1
    )
    kept = encode(chat(Q, say("assistant", "a")), chat(), seq_len=whole - 2, truncate="drop").counts
    assert (kept["dropped"], kept["rows"], kept["truncated"]) == (1, 1, 0)


def test_examples_without_loss_are_left_out_and_a_set_of_them_is_refused() -> None:
    silent, long = chat(Q, {**A, "weight": 0.0}), chat(say("user", "q" * 90), A)
    counts = encode(silent, long, chat()).counts
    assert (
        counts["examples"],
        counts["rows"],
        counts["fully_masked"],
        counts["beyond"],
        counts["truncated"],
    ) == (
        3,
        1,
        1,
        1,
        0,
    )
    left_out = r"1 example left out because no token has loss; 1 example left out because the answers begin after seq_len"
    with pytest.raises(RequestError, match=rf"nothing to train on .*{left_out}"):
        encode(silent, long)
    pair = ChatExample("f:1", "pair", long.messages[:1], ((A,), (say("assistant", "b"),)))
    assert encode(pair, bare("pair", "a", "b")).counts["beyond"] == 1


def test_rows_beyond_one_per_conversation_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer(("<s>", "</s>", "<|im_start|>", "<|im_end|>"))
    template = ChatTemplate(PUBLISHED["qwen3"], tokenizer)
    encoded = ChatEncoder(tokenizer, template, 200).encode([chat(Q, A, Q, A)])
    assert len(encoded.items) == 2 and encoded.counts["split_rows"] == 1
    assert "1 additional row, because the template changes earlier turns" in str(encoded)
    both = ChatExample("f:1", "pair", (Q,), ((A, Q, A), (A, Q, say("assistant", "x"))))
    with pytest.raises(RequestError, match="expected answers of one turn"):
        ChatEncoder(tokenizer, template, 200).encode([both])


def test_what_cannot_be_written_is_refused_or_listed() -> None:
    wrong = chat(Q, {**A, "tool_calls": []}, tools=({"type": "function"},))
    with pytest.raises(RequestError, match="f:1: tools: the chat template does not read it"):
        encode(chat(), wrong)
    problems: list[Problem] = []
    assert encode(wrong, chat(), wrong, problems=problems).counts["rows"] == 1
    assert [one.where for one in problems] == ["f:1", "f:1"]
    assert encode(wrong, problems=problems).items == []  # then the list says it all
    with pytest.raises(RequestError, match="f:1: chat template: got None; expected"):
        encode(chat(), template=None)
    with pytest.raises(RequestError, match="f:1: row: got a prompt without an answer"):
        encode(ChatExample("f:1", "answer", (Q,), reference={"answer": 1}))
    with pytest.raises(RequestError, match="seq_len: got 1; expected 2 tokens or more"):
        encode(chat(), seq_len=1)


def test_prompts_are_those_that_the_model_is_asked_with() -> None:
    asked = ChatExample("f:1", "answer", (Q,), reference={"answer": 1}, bare=True)
    assert prompt_ids(asked, TOKENIZER, PLAIN) == PLAIN.encode([Q])
    assert prompt_ids(asked, TOKENIZER, None) == [BOS, *b"q"]


def test_a_vocabulary_gets_the_template_it_is_made_for(capsys: pytest.CaptureFixture[str]) -> None:
    chatml = byte_tokenizer(("<s>", "</s>", "<|im_start|>", "<|im_end|>"))
    assert template_for([chat()], chatml, None).origin == "the built-in template chatml"
    plain = template_for([chat()], TOKENIZER, None)
    assert plain.origin == "the built-in template plain" and plain.stop_tokens == (EOS,)
    assert "built-in template plain" in capsys.readouterr().err
    endless = Tokenizer(TOKENIZER._backend)
    with pytest.raises(RequestError, match=r"tokenizer: got .no EOS token.; expected"):
        template_for([chat()], endless, None)
    assert template_for([bare(), ChatExample("f", "text", text="x")], endless, None) is None
    assert template_for([chat()], TOKENIZER, PLAIN) is PLAIN
