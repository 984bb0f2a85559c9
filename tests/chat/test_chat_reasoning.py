"""Reasoning apart from the answer: markers of templates and vocabularies, however the text is
cut.
"""

from pathlib import Path

import pytest

from transom.chat.built_in import named
from transom.chat.reasoning import Markers, find_markers
from transom.chat.template import ChatTemplate
from transom.tokenizers.training import byte_tokenizer

PUBLISHED = Path(__file__).parent / "published_templates"
HARMONY = (
    "<|startoftext|>",
    "<|return|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
)
NEW = (
    "{% for m in messages %}{% if m.reasoning_content %}[[{{ m.reasoning_content }}]]{% endif "
    "%}{{ m.content }};"
)


def template(source: str, *special: str) -> ChatTemplate:
    tokens = special or ("<|im_start|>", "<|im_end|>")
    return ChatTemplate(source, byte_tokenizer(tokens))


def published(name: str, *special: str) -> ChatTemplate:
    return template((PUBLISHED / f"{name}.jinja").read_text(), *special)


def split(markers: Markers, text: str, size: int) -> tuple[str, str]:
    """(reasoning, answer) of a text that comes in pieces of this size."""
    splitter = markers.splitter()
    pieces = [
        piece for at in range(0, len(text), size) for piece in splitter.push(text[at : at + size])
    ]
    shown = "".join(text for _, text in [*pieces, *splitter.finish()])
    assert splitter.reasoning in shown and shown.endswith(splitter.answer)
    return splitter.reasoning, splitter.answer


QWEN = [
    ("<think>\nhm\n\nyes\n</think>\n\nTwo.\n", "hm\n\nyes", "Two.\n"),
    ("\n<think>hm</think>Two.", "hm", "Two."),
    ("Two.", "", "Two."),
    ("  Two", "", "  Two"),
    ("<think>\nhm", "hm", ""),  # cut short
    ("<think>\n\n</think>\n\nTwo.", "", "Two."),
    ("Write <think> and </thinking>", "", "Write <think> and </thinking>"),  # words of an answer
    ("<think>a</think>Write </think> or <think>.", "a", "Write </think> or <think>."),
    ("hm</think>\nTwo.", "hm", "Two."),  # only the end was written
    ("<thin", "", "<thin"),
]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(("text", "reasoning", "answer"), QWEN)
def test_reasoning_between_markers(text, reasoning, answer, size):
    markers = find_markers(published("qwen3"))
    assert (markers.opens, markers.closes) == ("<think>", "</think>")
    assert split(markers, text, size) == (reasoning, answer)


def test_the_prompt_for_an_answer_may_open_or_close_the_reasoning():
    inside = find_markers(published("deepseek-r1"))
    assert split(inside, "hm\n</think>\n\nTwo.", 1) == ("hm", "Two.")
    assert split(inside, "hm", 1) == ("hm", "")
    off = find_markers(published("qwen3"), enable_thinking=False)
    assert split(off, "Write </think>", 1) == ("", "Write </think>")


@pytest.mark.parametrize("size", [1, 4, 100])
def test_channels_other_than_the_final_one_are_reasoning(size):
    markers = find_markers(published("gpt-oss", *HARMONY))
    assert markers.channels and len(markers.control_ids(byte_tokenizer(HARMONY))) == 4
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>well<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Two.\n"
    )
    assert split(markers, text, size) == ("hm\nwell", "Two.\n")
    assert split(markers, "<|channel|>final<|message|>Two.", size) == ("", "Two.")
    for text, answer in (
        ("Two.", "Two."),
        ("Two<|end|><|start|>assistant<|start|>three", "Twothree"),
    ):
        assert split(markers, text, size) == ("", answer)  # a model that knows no channels
    assert split(markers, "<|channel|>ana", size) == ("", "")


def test_markers_come_from_what_a_template_writes_or_from_the_vocabulary():
    ready = named("mistral-v13")
    tokenizer = byte_tokenizer(("<s>", "</s>", "[INST]", "[/INST]", "[THINK]", "[/THINK]"))
    mistral = find_markers(ChatTemplate(ready.source(tokenizer), tokenizer))
    assert (mistral.opens, mistral.closes) == ("[THINK]", "[/THINK]")
    assert mistral.control_ids(tokenizer) == tuple(
        map(tokenizer.token_to_id, ("[THINK]", "[/THINK]"))
    )
    own = find_markers(template(NEW + "{% endfor %}"))
    assert (own.opens, own.closes) == ("[[", "]]")
    plain = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    assert find_markers(template(plain)) is None
    known = find_markers(template(plain, "<|im_start|>", "<|im_end|>", "<think>", "</think>"))
    assert (known.opens, known.closes) == ("<think>", "</think>")
