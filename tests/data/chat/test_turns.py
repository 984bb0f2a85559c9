"""Which tokens of a conversation carry loss: against transformers, for every template published
with a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from tests.chat.chat_texts import (
    CALL,
    CONVERSATIONS,
    PUBLISHED,
    SPECIAL,
    TEXT,
    TOOL_TALK,
    TOOLS,
    say,
    tokenizer_pair,
)
from tests.tokenizers.makers import sentencepiece_model
from transom.base.errors import RequestError
from transom.chat.built_in import BUILT_IN, named
from transom.chat.template import ChatTemplate
from transom.data.chat.turns import EncodedChat, Turns, bare_row, text_row
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import byte_tokenizer, train_bpe

TALK = [
    say("user", "Hi"),
    say("assistant", "One two"),
    say("user", "b"),
    say("assistant", "Tré 世界"),
]
THOUGHT = [
    say("user", "a"),
    {"role": "assistant", "content": "x", "reasoning_content": "hm"},
    *TALK,
]
REWRITES = ("qwen3", "gpt-oss")  # write an earlier answer otherwise than a last one
ASKS_ONLY = ("deepseek-r1",)  # ask for an answer with words that they do not write in front of it


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer with the control tokens of all families, here and in transformers."""
    return tokenizer_pair(tmp_path_factory.mktemp("tokenizer"))


def rows_of(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: Any = None
) -> list[EncodedChat]:
    weights = [float(message["role"] == "assistant") for message in messages]
    return Turns(template, template.tokenizer).rows(messages, tools, weights)


def said(tokenizer: Tokenizer, row: EncodedChat) -> list[str]:
    """The text of each answer of a row."""
    out = []
    for answer in row.answers:
        part = slice(answer.start, answer.stop)
        out.append(
            tokenizer.decode(np.asarray(row.ids[part])[row.weights[part] > 0], skip_special=False)
        )
    return out


def asked(peer: Any, source: str, messages: list[dict[str, Any]], **more: Any) -> list[int]:
    ids: list[int] = peer.apply_chat_template(
        messages, chat_template=source, return_dict=False, **more
    )
    return ids


@pytest.mark.parametrize(
    "name", [*sorted({*PUBLISHED} - {*ASKS_ONLY}), *(one.name for one in BUILT_IN)]
)
def test_every_answer_stands_behind_the_prompt_that_transformers_asks_with(
    made: Any, name: str
) -> None:
    tokenizer, peer = made
    source = PUBLISHED.get(name) or named(name).source(tokenizer)
    template = ChatTemplate(source, tokenizer)
    answers = [
        (at, row, answer)
        for row in rows_of(template, TALK)
        for at, answer in enumerate(row.answers)
    ]
    assert len(answers) == 2
    for messages, (_, row, answer) in zip((TALK[:2], TALK[:4]), answers, strict=True):
        prompt = asked(peer, source, messages[:-1], add_generation_prompt=True)
        whole = asked(peer, source, messages)
        assert (
            row.ids[: answer.start].tolist() == prompt
            and row.ids[: answer.stop].tolist() == whole[: answer.stop]
        )
        assert answer.ended and answer.like_prompt
        assert (
            int(row.ids[answer.stop - 1]) in template.stop_tokens
            and row.weights[answer.stop - 1] == 1.0
        )
        last = tokenizer.decode(row.ids[answer.start : answer.stop], skip_special=False)
        assert messages[-1]["content"] in last
    trained = sum(answer.stop - answer.start for _, _, answer in answers)
    rows = rows_of(template, TALK)
    assert sum(np.count_nonzero(row.weights) for row in rows) == trained
    assert len(rows) == 1 + (name in REWRITES)


@pytest.mark.parametrize("talk", ["system", "many"])
@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "llama2", "mistral-v7-tekken"])
def test_blocks_of_templates_are_what_transformers_masks(made: Any, name: str, talk: str) -> None:
    tokenizer, peer = made
    source = named(name).source(tokenizer)
    (row,) = rows_of(ChatTemplate(source, tokenizer), CONVERSATIONS[talk])
    marked = peer.apply_chat_template(
        CONVERSATIONS[talk],
        chat_template=source,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    count = len(row.ids)
    assert row.ids.tolist() == marked["input_ids"][:count] and (row.weights > 0).tolist() == [
        bool(one) for one in marked["assistant_masks"][:count]
    ]
    assert not any(marked["assistant_masks"][count:])  # only what trains nothing is left out


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("llama2", [" Hé 世界👩‍👩‍👧 </s>", " Two </s>"]),
        ("llama3", ["Hé 世界👩‍👩‍👧<|eot_id|>", "Two<|eot_id|>"]),
        ("qwen2.5", ["Hé 世界👩‍👩‍👧<|im_end|>", "Two<|im_end|>"]),
        ("mistral-v3", [" Hé 世界👩‍👩‍👧</s>", " Two</s>"]),
        ("gemma3", ["Hé 世界👩‍👩‍👧<end_of_turn>", "Two<end_of_turn>"]),
        ("phi3", ["Hé 世界👩‍👩‍👧<|end|>", "Two<|end|>"]),
        ("zephyr", ["Hé 世界👩‍👩‍👧</s>", "Two</s>"]),
    ],
)
def test_loss_covers_answers_and_their_ends(made: Any, name: str, answers: list[str]) -> None:
    talk = [
        say("user", "a"),
        say("assistant", "Hé 世界👩‍👩‍👧"),
        say("user", "b<|im_end|>"),
        say("assistant", "Two"),
    ]
    template = ChatTemplate(PUBLISHED[name], made[0])
    (row,) = rows_of(template, talk)
    assert said(made[0], row) == answers
    assert row.ids.tolist() == template.encode(talk, add_generation_prompt=False)[: len(row.ids)]


def test_loss_on_composed_characters(tmp_path: Path) -> None:
    """Qwen's vocabulary composes characters before it looks them up, so offsets move."""
    import tokenizers

    train_bpe([TEXT], 400, SPECIAL).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.save(str(file))
    tokenizer = Tokenizer.load(tmp_path)
    template = ChatTemplate(named("chatml").source(tokenizer), tokenizer)
    talk = [say("user", "e\u0301" * 9), say("assistant", "a\u0308b")]
    (row,) = rows_of(template, talk)
    assert said(tokenizer, row) == ["\u00e4b<|im_end|>"]


def test_a_template_that_forgets_thoughts_gives_a_row_for_each_thought(made: Any) -> None:
    tokenizer, _ = made
    first, second, third = rows_of(ChatTemplate(PUBLISHED["qwen3"], tokenizer), THOUGHT)
    assert said(tokenizer, first) == ["<think>\nhm\n</think>\n\nx<|im_end|>"]
    assert said(tokenizer, second) == ["<think>\n\n</think>\n\nOne two<|im_end|>"]
    assert said(tokenizer, third) == ["<think>\n\n</think>\n\nTré 世界<|im_end|>"]
    assert "hm" not in tokenizer.decode(third.ids)


def test_answers_that_nest_share_a_row_though_others_do_not(made: Any) -> None:
    """Within the calls of one question Qwen3 keeps thoughts, so they are one row; the next question
    is another.
    """
    tokenizer, _ = made
    think = {"role": "assistant", "reasoning_content": "hm"}
    tools = [
        {**think, "content": "call"},
        say("user", "<tool_response>\n1\n</tool_response>"),
        {**think, "content": "x"},
    ]
    first, second = rows_of(
        ChatTemplate(PUBLISHED["qwen3"], tokenizer), [TALK[0], *tools, TALK[0], TALK[1]]
    )
    assert len(first.answers) == 2 and len(second.answers) == 1


def test_tools_and_calls(made: Any) -> None:
    tokenizer, _ = made
    (row,) = rows_of(ChatTemplate(PUBLISHED["qwen2.5"], tokenizer), TOOL_TALK, TOOLS)
    call = json.dumps(CALL["function"], ensure_ascii=False)
    assert said(tokenizer, row)[1] == "Warm.<|im_end|>" and call in said(tokenizer, row)[0]
    # Mistral's tools stand in front of the last question: with another behind it, the call had
    # another prompt.
    mistral = ChatTemplate(PUBLISHED["mistral-v3"], tokenizer)
    rows = rows_of(mistral, [*TOOL_TALK, TALK[0], TALK[1]], TOOLS)
    assert [len(row.answers) for row in rows] == [2, 1] and all(
        "weather" in tokenizer.decode(r.ids) for r in rows
    )


@pytest.mark.parametrize("name", ["zephyr", "phi3", "llama3"])
def test_a_template_without_words_for_calls_is_refused(made: Any, name: str) -> None:
    template = ChatTemplate(PUBLISHED[name], made[0])
    with pytest.raises(
        RequestError, match=r"messages\[1\]: .* leaves out tool_calls of assistant: 'weather'"
    ):
        rows_of(template, TOOL_TALK[:2])


def test_weights_of_turns_are_those_of_their_tokens(made: Any) -> None:
    tokenizer, _ = made
    template = ChatTemplate(PUBLISHED["llama3"], tokenizer)
    (row,) = Turns(template, tokenizer).rows(TALK, None, [0, 0.25, 0, 2])
    first, second = row.answers
    assert set(row.weights[first.start : first.stop].tolist()) == {0.25}
    assert set(row.weights[second.start : second.stop].tolist()) == {2.0}
    (short,) = Turns(template, tokenizer).rows(TALK, None, [0, 1, 0, 0])
    assert (
        short.ids.tolist() == row.ids[: first.stop].tolist()
    )  # what comes behind the last answer with loss trains nothing


HEAD = "{% for m in messages %}{% if m.role == 'assistant' %}"
TAIL = (
    "{% else %}u{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}a{% "
    "endif %}"
)


def test_the_end_of_turn_carries_loss_also_where_a_block_leaves_it_out(made: Any) -> None:
    tokenizer, _ = made
    outside = "a{% generation %}{{ m.content }}{% endgeneration %}<|end|>"
    (row,) = rows_of(ChatTemplate(HEAD + outside + TAIL, tokenizer), TALK)
    assert said(tokenizer, row) == ["One two<|end|>", "Tré 世界<|end|>"] and all(
        a.ended for a in row.answers
    )
    (row,) = rows_of(ChatTemplate(HEAD + "a{{ m.content }}!" + TAIL, tokenizer), TALK[:2])
    assert said(tokenizer, row) == ["One two!"] and not row.answers[0].ended
    assert row.answers[0].stop == len(row.ids)


def test_answers_behind_other_tokens_than_their_prompt_are_told(made: Any) -> None:
    tokenizer, _ = made
    other = "b{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    (row,) = rows_of(ChatTemplate(HEAD + other + TAIL, tokenizer), TALK)
    assert said(tokenizer, row) == ["One two<|end|>", "Tré 世界<|end|>"]
    assert [answer.like_prompt for answer in row.answers] == [False, False]


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (
            PUBLISHED["mistral-v3"],
            [say("system", "Be"), *TALK],
        ),  # it keeps the system message for the prompt
        (HEAD + "b{{ m.content }}<|end|>" + TAIL, TALK),
        (
            HEAD
            + "a{{ m.content }}"
            + TAIL.replace("{% else %}", "{% else %}{% generation %}{% endgeneration %}"),
            TALK,
        ),
    ],
)
def test_a_template_that_answers_elsewhere_than_it_asks_is_refused_by_name(
    made: Any, source: str, messages: list[dict[str, Any]]
) -> None:
    template = ChatTemplate(source, made[0], origin="this.jinja")
    with pytest.raises(RequestError, match=r"messages\[\d\]: this.jinja .*; expected"):
        rows_of(template, messages)


def test_the_end_of_turn_is_known_by_its_place_and_not_by_its_id(made: Any, tmp_path: Path) -> None:
    """Where pad is EOS and EOS ends turns, the answer's end carries loss and the same token
    elsewhere does not.
    """
    made[0].save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "</s>"}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.pad_id == tokenizer.eos_id is not None
    talk = [say("user", "Hi</s>"), say("assistant", "a</s>b")]
    (row,) = rows_of(ChatTemplate(PUBLISHED["zephyr"], tokenizer), talk)
    assert said(tokenizer, row) == ["a</s>b</s>"]
    ends = [
        weight
        for id, weight in zip(row.ids, row.weights.tolist(), strict=True)
        if id == tokenizer.eos_id
    ]
    assert ends == [0.0, 1.0]  # of the question, of the answer; words of the messages are text


# Plain text


def test_the_plain_template_needs_no_control_tokens_but_an_end(made: Any) -> None:
    tokenizer = byte_tokenizer()
    template = ChatTemplate(named("plain").source(tokenizer), tokenizer)
    talk = [say("user", " user\nHi<|end_of_text|>assistant\n"), say("assistant", "  Yes\n")]
    (row,) = rows_of(template, talk)
    assert said(tokenizer, row) == ["Yes<|end_of_text|>"]
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert [id for id in row.ids if id >= 256] == [bos, eos, eos]  # the user's words end no turn
    with pytest.raises(RequestError, match="no words for tool calls"):
        rows_of(template, TOOL_TALK)


def test_a_document_is_framed_and_learnt_but_for_its_first_token() -> None:
    row = text_row(byte_tokenizer(), "ab", 0.5)
    assert row.ids.tolist() == [256, 97, 98, 257] and row.weights.tolist() == [0.0, 0.5, 0.5, 0.5]
    row = text_row(byte_tokenizer(), "", 1.0)
    assert row.ids.tolist() == [256, 257] and row.weights.tolist() == [0.0, 1.0]


def test_an_answer_does_not_grow_into_its_prompt() -> None:
    tokenizer = train_bpe(["Answer: yes yes yes no " * 20], 269)
    prompt = "Answer: "
    assert tokenizer.encode("Answer: yes")[: len(tokenizer.encode(prompt))] != tokenizer.encode(
        prompt
    )
    row = bare_row(tokenizer, prompt, "yes", 1.0)
    (answer,) = row.answers
    assert row.ids[: answer.start].tolist() == tokenizer.encode(prompt, add_bos=tokenizer.adds_bos)
    assert tokenizer.decode(row.ids) == "Answer: yes" and row.ids[-1].tolist() == tokenizer.eos_id
    assert answer.like_prompt and np.flatnonzero(row.weights)[0] == answer.start
    everything = bare_row(tokenizer, prompt, "yes", 1.0, all_tokens=True)
    assert everything.weights.tolist() == [0.0, *[1.0] * (len(row.ids) - 1)]


def test_sentencepiece_writes_no_space_between_prompt_and_answer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = Tokenizer.load(tmp_path)
    peer = sentencepiece.SentencePieceProcessor(
        model_proto=(tmp_path / "tokenizer.model").read_bytes()
    )
    for prompt, answer, like_prompt in (("and", " do", True), ("and ", "do", False)):
        row = bare_row(tokenizer, prompt, answer, 1.0)
        assert row.ids[1:-1].tolist() == peer.encode(prompt + answer)
        assert row.answers[0].like_prompt == like_prompt
        trained = [id for id, weight in zip(row.ids, row.weights, strict=True) if weight]
        assert tokenizer.decode(trained).strip() == "do"
