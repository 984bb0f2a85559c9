"""Rewards judge what is written, refuse what they cannot judge, and name the row where one's own
code fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from transom.base.errors import RequestError, WorkError
from transom.training.rl.rewards import open_reward

JUDGED = [
    ("exact", "  the Answer ", {"answer": "The  answer"}, 1.0),
    ("exact", "Paris", {"answer": ["London", "paris"]}, 1.0),
    ("exact", "Paris is it", {"answer": "Paris"}, 0.0),
    ("exact", "7", {"solution": 7}, 1.0),
    ("number", "so it is 42.0.", {"answer": "6 * 7 = 42\n#### 42"}, 1.0),
    ("number", "42", {"answer": [41, "42"]}, 1.0),
    ("number", "first 43, then #### 42", {"answer": 43}, 0.0),
    ("number", "\\boxed{\\frac{3}{4}}, not 4", {"solution": "\\boxed{0.75}"}, 1.0),
    ("regex", "call 555-123", {"answer": r"\d{3}-\d{3}$"}, 1.0),
    ("regex", "call 555", {"answer": [r"^\d", "xyz"]}, 0.0),
]


@pytest.mark.parametrize(
    ("name", "answer", "reference", "value"), JUDGED, ids=lambda one: str(one)[:24]
)
def test_built_in_rewards_judge_as_they_say(name, answer, reference, value):
    assert open_reward(name)(answer, reference, "row") == value


@pytest.mark.parametrize(
    ("name", "reference", "sentence"),
    [
        ("exact", {"tests": "assert True"}, "row 3: answer: got None"),
        ("number", {"answer": "many"}, "row 3: answer: got 'many'"),
        ("regex", {"answer": "("}, "row 3: answer: got"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused_before_an_answer_is_there(
    name, reference, sentence
):
    with pytest.raises(RequestError, match=sentence):
        open_reward(name).check(reference, "row 3")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ones_own_function_is_found_in_the_current_directory(here):
    (here / "own_found.py").write_text(
        "def score(answer, reference):\n    return len(answer) / reference['n']\n"
    )
    reward = open_reward("own_found:score")
    assert reward("ab", {"n": 4}, "row") == 0.5
    before = reward.hash
    (here / "own_found.py").write_text("def score(answer, reference):\n    return 0.0\n")
    assert reward.hash != before


@pytest.mark.parametrize(
    ("name", "body", "sentence"),
    [
        ("own_raising", "raise KeyError('x')", "raises KeyError: 'x'"),
        ("own_nothing", "return None", "gives None; expected a finite number"),
        ("own_infinite", "return float('inf')", "gives inf; expected a finite number"),
    ],
)
def test_an_error_of_ones_own_function_names_it_and_the_row(here, name, body, sentence):
    (here / f"{name}.py").write_text(f"def score(answer, reference):\n    {body}\n")
    with pytest.raises(WorkError) as caught:
        open_reward(f"{name}:score")("", {}, "row 5")
    assert str(caught.value) == f"reward {name}:score: row 5: {sentence}"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "exakt",
            "got 'exakt'; expected .*did you mean 'exact'",
        ),
        ("os.system:", "expected exact"),
        ("missing_module:score", "there is no .*missing_module.py"),
        ("own_broken:score", "importing it raises ZeroDivisionError"),
        ("own_leaving:score", "importing it raises SystemExit"),
        ("own_typo:score", "expected a function of own_typo.py; did you mean 'scores'"),
        ("json:loads", "got 'json:loads'"),
    ],
)
def test_a_reward_that_is_none_is_one_sentence(here, name, sentence):
    for file, text in (
        ("broken", "1 / 0"),
        ("leaving", "raise SystemExit"),
        ("typo", "def scores(): ..."),
    ):
        (here / f"own_{file}.py").write_text(text)
    (here / "json.py").write_text("def loads(): ...")
    with pytest.raises(RequestError, match=sentence):
        open_reward(name)
