"""Exact match against what `transformers` generates."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluation.twins import LONGEST
from transom.base.errors import RequestError
from transom.chat.template import ChatTemplate
from transom.evaluation import answers
from transom.evaluation.answers import score_answers
from transom.evaluation.eval_args import EvalArgs
from transom.evaluation.task_data import AnswerRow, DataSet
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


def score(model, rows, **args):
    return score_answers(
        model, DataSet("a", "answers", (), rows), EvalArgs(max_new_tokens=NEW, **args)
    )


def texts(result):
    return [row["text"] for row in result.rows]


def test_batches_say_what_transformers_says_alone(opened, generate, monkeypatch):
    prompts = ["The quick brown", "Question", "The dog sleeps on and the fox jumps", "Größe"]
    want = [generate(opened.tokenizer.encode_prompt(prompt)) for prompt in prompts]
    rows = [row(prompt, (said, "y")) for prompt, said in zip(prompts, want, strict=True)]
    for cache_tokens in (1, 64, 1 << 15):
        monkeypatch.setattr("transom.evaluation.answers.CACHE_TOKENS", cache_tokens)
        got = score(opened, rows)
        assert texts(got) == want and got.scores["exact_match"].score == 1
    assert got.facts["tokens"] == len(prompts) * NEW and got.facts["unfinished"] == len(prompts)


def test_messages_go_through_the_template(opened, generate):
    want = generate(opened.template.encode(MESSAGES))
    got = score(opened, [row(messages=MESSAGES)])
    assert texts(got) == [want] and got.scores["exact_match"].score == 0


def test_a_stop_text_ends_an_answer(opened):
    rows = [row("The quick brown")]
    (complete,) = texts(score(opened, rows))
    stop = complete[4:6]
    got = score(opened, rows, stop=(stop,))
    assert texts(got) == [complete[: complete.index(stop)]] and got.facts["unfinished"] == 0


def test_a_prompt_without_room_is_named(opened):
    rows = [row("The"), row("x " * LONGEST, number=2)]
    with pytest.raises(RequestError, match=f"a:2: a prompt of .* expected {LONGEST} together"):
        score(opened, rows)


def test_messages_need_a_template(opened, monkeypatch):
    monkeypatch.setitem(opened.__dict__, "template", None)
    with pytest.raises(RequestError, match="a:1: messages: this model has no chat template"):
        score(opened, [row(messages=MESSAGES)])


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
    args = EvalArgs(extract=extract, ignore_case=ignore_case)
    assert args.is_right(args.answer_in(text), ("42 ", "forty-two")) is right


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(RequestError, match="extract: got '\\('"):
        EvalArgs(extract="(")


def test_reasoning_is_not_compared(opened, monkeypatch):
    source = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    monkeypatch.setitem(opened.__dict__, "template", ChatTemplate(source, opened.tokenizer))
    said = Completion("<think>five?</think>\nfour", [1], "stop")
    monkeypatch.setattr(answers, "complete_prompts", lambda *_, **__: iter(enumerate([said, said])))
    rows = [row(messages=MESSAGES, answers=("four",)), row("two and two", answers=(said.text,))]
    got = score(opened, rows)
    assert got.scores["exact_match"].score == 1 and texts(got) == ["four", said.text]
    assert [row.get("reasoning") for row in got.rows] == ["five?", None]
