"""What data files say they are, and the sentences for those that say nothing or two things."""

import json

import pyarrow as pa
import pytest

from transom.base.errors import RequestError
from transom.evaluation.task_data import kind_of, open_data, read_tasks

QUESTION = {"question": "Which?", "choices": ["red", "blue", "green"], "answer": 1}
ANSWER = {"prompt": "2 + 2 =", "answer": "4"}


@pytest.fixture
def write(tmp_path):
    """Write rows (or raw text) as a .jsonl file; its name."""

    def write(*rows, name="rows.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (QUESTION, "choices"),
        (ANSWER, "answers"),
        ({"messages": [{"role": "user", "content": "2 + 2?"}], "answer": ["4", "four"]}, "answers"),
        ({"text": "a document"}, "text"),
    ],
)
def test_a_file_is_what_its_first_row_says(write, row, kind):
    assert kind_of(write("", row)) == kind


def test_all_else_is_text(tmp_path):
    assert [kind_of(str(tmp_path)), kind_of(f"{tmp_path}/*.jsonl"), kind_of("notes.txt")] == [
        "text"
    ] * 3


@pytest.mark.parametrize("answer", [1, "B", "blue"])
def test_an_answer_is_an_index_a_letter_or_a_text(write, answer):
    (row,) = read_tasks(write({**QUESTION, "answer": answer}))
    assert (row.id, row.prompt, row.choices, row.answer) == (
        "rows.jsonl:1",
        "Which?",
        ("red", "blue", "green"),
        1,
    )


def test_answers_may_be_several_and_rows_may_be_limited(write):
    path = write(ANSWER, "", {"question": "Say hi", "answer": ["hi", "Hi"]}, {"prompt": 3})
    rows = read_tasks(path, limit=2)
    assert [(row.id, row.prompt, row.answers) for row in rows] == [
        ("rows.jsonl:1", "2 + 2 =", ("4",)),
        ("rows.jsonl:3", "Say hi", ("hi", "Hi")),
    ]


def test_keys_that_nothing_reads_are_said(write, capsys):
    read_tasks(write({**QUESTION, "subject": "colour"}, {**QUESTION, "id": 7}))
    assert capsys.readouterr().err.endswith(
        "rows.jsonl: keys that are not read: id (1 row), subject (1 row)\n"
    )


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({**QUESTION, "answer": 3}, "means no choice"),
        ({**QUESTION, "answer": True}, "means no choice"),
        ({**QUESTION, "choices": ["B", "A"], "answer": "A"}, "means more than one choice"),
        ({**QUESTION, "choices": ["red", "red"], "answer": "red"}, "means more than one choice"),
        ({**QUESTION, "choices": ["red"]}, "two texts or more"),
        ({**QUESTION, "choices": ["red", ""]}, "two texts or more"),
        ({**QUESTION, "prompt": "Which?"}, "one text"),
        ({"choices": ["a", "b"], "answer": 0}, "one text"),
        (ANSWER, "kind of row: got 'answers'; expected choices"),
        (
            '{"question": "\\ud800", "choices": ["a", "b"], "answer": 0}',
            "half a surrogate pair",
        ),
        ("[1, 2]", "one JSON object"),
        ("{", "one JSON object"),
    ],
)
def test_a_wrong_question_is_one_sentence_with_its_line(write, row, sentence):
    with pytest.raises(RequestError, match=sentence) as found:
        read_tasks(write(QUESTION, row))
    assert "rows.jsonl:2: " in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (QUESTION, "kind of row: got 'choices'; expected answers"),
        ({"prompt": "x"}, "expected rows with choices and answer; answer; text"),
        ({"prompt": "x", "answer": []}, "a text or a list of texts"),
        ({"prompt": "x", "answer": 4}, "a text or a list of texts"),
        (
            {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "answer": "4"},
            "no prompt beside them",
        ),
        ({"messages": [], "answer": "4"}, "a list of objects"),
        ({"prompt": "", "answer": "4"}, "one text"),
    ],
)
def test_a_wrong_prompt_is_one_sentence_with_its_line(write, row, sentence):
    with pytest.raises(RequestError, match=sentence) as found:
        read_tasks(write(ANSWER, row))
    assert "rows.jsonl:2: " in str(found.value)


@pytest.mark.parametrize("rows", [[""], [{"label": 3}]])
def test_a_file_that_says_nothing_is_refused(write, rows):
    with pytest.raises(RequestError, match=r"expected (one row or more|rows) with"):
        open_data([write(*rows)])


def test_rows_may_stand_in_parquet(tmp_path):
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist([QUESTION, {**QUESTION, "answer": 2}]), path)
    (data,) = open_data([str(path)])
    assert (data.kind, [row.answer for row in data.choices]) == ("choices", [1, 2])
