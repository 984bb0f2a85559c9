"""Exact match against what `transformers` generates."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluation.twins import LONGEST
from transom.base.errors import RequestError
from transom.chat.template import ChatTemplate
from transom.evaluation import answers
from transom.evaluation.answers import score_answers
from transom.evaluation.eval_args import EvalArgs, Matching
from transom.evaluation.task_data import AnswerRow
from transom.inference.text import Completion

MESSAGES = ({"role": "user", "content": "What is two and two? </s>"},)
NEW = 10


@pytest.fixture(scope="module")
def generate(folder):
    """Greedy text of `transformers` behind ids."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )

    def generate(ids):
        tokens = torch.tensor([ids])
        mask = torch.ones_like(tokens)
        out = model.generate(
            tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)

    return generate


def row(prompt="", answers=("x",), messages=(), number=1):
    return AnswerRow(f"a:{number}", prompt, messages, answers)


def test_batches_say_what_transformers_says_alone(subject, generate, monkeypatch):
    prompts = ["The quick brown", "Question", "The dog sleeps on and the fox jumps", "Größe"]
    want = [generate(subject.encode(prompt)) for prompt in prompts]
    rows = [row(prompt, (said, "y")) for prompt, said in zip(prompts, want, strict=True)]
    for cache_tokens in (1, 64, 1 << 15):
        monkeypatch.setattr("transom.evaluation.answers.CACHE_TOKENS", cache_tokens)
        got = score_answers(subject, rows, max_new_tokens=NEW, matching=Matching())
        assert got.texts == want and got.right.all()
    assert got.tokens == len(prompts) * NEW and got.unfinished == len(prompts)


def test_messages_go_through_the_template(subject, generate):
    want = generate(subject.template.encode(MESSAGES))
    got = score_answers(subject, [row(messages=MESSAGES)], max_new_tokens=NEW, matching=Matching())
    assert got.texts == [want] and not got.right.any()


def test_a_stop_text_ends_an_answer(subject):
    rows = [row("The quick brown")]
    whole = score_answers(subject, rows, max_new_tokens=NEW, matching=Matching()).texts[0]
    stop = whole[4:6]
    got = score_answers(subject, rows, max_new_tokens=NEW, matching=Matching(), stop=[stop])
    assert got.texts == [whole[: whole.index(stop)]] and got.unfinished == 0


def test_a_prompt_without_room_is_named(subject):
    rows = [row("The"), row("x " * LONGEST, number=2)]
    with pytest.raises(RequestError, match=f"a:2: a prompt of .* expected {LONGEST} together"):
        score_answers(subject, rows, max_new_tokens=NEW, matching=Matching())


def test_messages_need_a_template(subject, monkeypatch):
    monkeypatch.setattr(subject, "template", None)
    with pytest.raises(RequestError, match="a:1: messages: this model has no chat template"):
        score_answers(subject, [row(messages=MESSAGES)], max_new_tokens=NEW, matching=Matching())


@pytest.mark.parametrize(
    ("text", "extract", "ignore_case", "right"),
    [
        (" 42\n", None, False, True),
        ("42.", None, False, False),
        ("It is 7, no: 42.", r"\d+", False, True),  # the last match
        ("The answer is 42, said 7", r"answer is (\d+)", False, True),  # its group
        ("#### 42", r"(?:answer is|#### )(?:(\d+)|none)", False, True),
        ("forty-two", r"\d+", False, False),
        ("FORTY-TWO", None, True, True),
        ("FORTY-TWO", None, False, False),
    ],
)
def test_what_counts_as_right(text, extract, ignore_case, right):
    matching = EvalArgs(extract=extract, ignore_case=ignore_case).matching
    assert matching.right(matching.found(text), ("42 ", "forty-two")) is right


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(RequestError, match="extract: got '\\('"):
        EvalArgs(extract="(")


def test_reasoning_is_not_compared(subject, monkeypatch):
    source = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    monkeypatch.setitem(subject.__dict__, "template", ChatTemplate(source, subject.tokenizer))
    said = Completion("<think>five?</think>\nfour", [1], "stop")
    monkeypatch.setattr(answers, "generated", lambda *_, **__: iter(enumerate([said, said])))
    rows = [row(messages=MESSAGES, answers=("four",)), row("two and two", answers=(said.text,))]
    got = score_answers(subject, rows, max_new_tokens=NEW, matching=Matching())
    assert got.right.all() and got.texts == ["four", said.text] and got.reasoning == ["five?", ""]
