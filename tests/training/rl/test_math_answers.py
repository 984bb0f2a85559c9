"""Reward `number`: a table of references and answers, references that are refused, and answers that
never end.
"""

from __future__ import annotations

import sys
import threading

import pytest

from transom.base.errors import RequestError
from transom.training.rl import math_answers
from transom.training.rl.math_answers import check_reference, exact_number, final_answer, same_value
from transom.training.rl.rewards import open_reward

# (reference, answer): the same value.
SAME = [
    ("(1,2)", "(1,2)"), ("(2,1)", r"\left(2, 1\right)"), (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
    (r"2\sqrt{3}", "The length is $2\\sqrt{3}$."), ("7 m^3", "7 m^3"), (r"7\text{ m}^3", "7"),
    ("\u00bd", "0.5"), ("3.5", "3\u00bd"),
    ("0.5", r"\frac12"), (r"\frac12", "0.5"), ("0.5", "1/2"), (r"3\frac{1}{2}", "3.5"), ("3.5", "3 1/2"),
    (r"50\%", r"50\%"), (r"50\%", "0.5"), ("0.5", "50%"), ("1,000", "1000"), ("1{,}000", "1 000"),
    ("1000", r"1\,000"), ("$1,234.50", "1234.5"), ("[1,2]", "[1, 2]"), (r"\{1,2\}", r"\{2,1\}"),
    ("1,2", r"\boxed{1, 2}"), ("-3", "\u22123"), ("2.5e-3", "0.0025"), (r"2.5 \times 10^{-3}", "0.0025"),
    ("1e5", "100,000"), ("10^{-2}", "0.01"), ("2^{10}", "1024"), ("6*7 = 42\n#### 42", "so it is 42."),
    ("42", "6 * 7 = 42\n#### 42"), ("42", "#### 42 apples and not 43"), ("42", r"\boxed{41}. No, \boxed{42}"),
    ("42", "first 43, then 42"), (r"\boxed{0.75}", r"\boxed{\frac{3}{4}}, not 4"), ("5", r"\boxed{x = 5}"),
    ("x=5", "5"), ("12", r"\boxed{12\text{ cm}}"), (r"12\text{ cm}", "12"), ("5 apples", "5"),
    ("90", r"90^\circ"), (r"\pi", r"$\pi$"), ("x+1", "1+x"), ("(x+1)^2", r"\boxed{x^2+2x+1}"), ("5", "**5**."),
    ("72", "Natalia sold 72 clips altogether in April and May."), (r"\infty", r"\infty"), ("2:3", "4:6"),
    (r"\frac{\pi}{2}", r"\pi/2"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("7", "it weighs 7kg"), (r"x \in [1,2]", "[1,2]"), ("3+4i", "4i+3"), ("18", r"It costs \$18."),
    ("12", r"<think>\boxed{13}</think> It is \boxed{12}."), ("18", "9 * 2: got <<9*2=18>>18 dollars"),
]  # fmt: skip
# (reference, answer): another value, or none.
OTHER = [
    ("5 km", "5 m"),
    ("(1,2)", "(1,3)"), ("(1,2)", "2"), ("(2,1)", "(1,2)"), ("(1,2]", "(1,2)"), (r"2\sqrt{3}", "3"),
    (r"2\sqrt{3}", "2"), ("2", r"2\sqrt{3"), ("3", r"2\sqrt{3}"), ("7 m^3", "3"), ("7 m^3", "7"),
    ("0.1", "0.10000001"), ("1/3", "0.333333"), (r"\pi", "3.14159"), ("100000000000000000001", "1e20"),
    ("-3", "3"), (r"\{1,2\}", r"\{1,3\}"), ("43", "#### 42 and not 43"), ("42", "first 42, then 43"),
    ("3", r"\boxed{3"), ("0", "nothing"), ("5", ""), ("5", "####"), ("10", "10, 20, 30"), ("x^2", "x^3"),
    ("1000", "1,00"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("(-\\infty, 2]", "(-\\infty, 2)"), ("5", "5/0"), ("2", "2x"), ("20", r"\boxed{10 < 20}"),
    ("(0,1)", "x > 0"), ("0.01", "1e-99999999"), ("3", r"\boxed{n: got 3k}"),
    ("12", r"\boxed{12} \boxed{"), ("12", "Answer: -12"),
]  # fmt: skip


@pytest.mark.parametrize(("pairs", "same"), [(SAME, True), (OTHER, False)])
def test_values_are_compared_and_not_digits(pairs: list[tuple[str, str]], same: bool) -> None:
    wrong = [pair for pair in pairs if same_value(pair[1], pair[0]) is not same]
    assert wrong == []


@pytest.mark.parametrize(
    "reference", ["many", "", r"\text{many}", "3 or 4", "hello world 5", r"\frac{1}", "####"]
)
def test_a_reference_that_cannot_be_read_is_refused(reference: str) -> None:
    with pytest.raises(RequestError, match="answer: got "):
        check_reference(reference)


def test_every_reference_of_the_table_is_read() -> None:
    for reference, _ in (*SAME, *OTHER):
        check_reference(reference)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$1,234.50", 1234.5),
        (r"-\frac{1}{2}", -0.5),
        (r"-3\frac12", -3.5),
        ("-3 1/2", -3.5),
        (".5", 0.5),
        ("5.", 5),
        ("1,23", None),
        ("5 apples", None),
        ("1/0", None),
        ("1e999999999", None),  # a number whose digits would fill the memory
        ("9" * 5000, None),
    ],
)
def test_numbers_are_exact(text: str, value: float | None) -> None:
    found = exact_number(text)
    assert (None if found is None else float(found)) == value


def test_the_last_mark_holds_the_answer() -> None:
    assert final_answer(r"\boxed{5} or #### 6") == ("6", True)
    assert final_answer(r"#### 6 or \boxed{\frac{1}{2}}!") == (r"\frac{1}{2}", True)
    assert final_answer(" 7 ") == ("7", False)


def test_an_answer_that_never_ends_is_wrong_and_the_next_is_judged_outside_the_main_thread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(math_answers, "SECONDS", 1)
    math_answers._worker().close()
    found: list[bool] = []

    def judge() -> None:
        found.extend(
            same_value(one, "2") for one in (r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\sqrt{4}}")
        )

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    math_answers._worker().close()
    assert found == [False, True]
    assert "counts as wrong" in capsys.readouterr().err


def test_without_the_library_the_reward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RequestError, match=r"finetune\.reward: got 'number'; needs math-verify"):
        open_reward("number")
