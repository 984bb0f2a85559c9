"""Whether an answer has the value of a reference, compared exactly or by `math-verify`.

Limits of `math-verify` 0.9: an inequality (x > 0) does not equal an interval, nor i equal
\\sqrt{-1}. Periods (0.\\overline{3}) are not read. A percentage equals both numbers that it may
mean (50\\% is 50 and 0.5), and a list without brackets has no order. In prose, the last readable
number counts ("3 and a half" is 3). Units are compared only if both texts end with one. This module
does not import torch.
"""

from __future__ import annotations

import importlib.util
import re
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple
from unicodedata import normalize

from transom.base.errors import expect, notice, require
from transom.base.worker import Worker

SECONDS = 5  # for one comparison
BOXED = "\\boxed{"

_DIGITS = r"(?:\d{1,3}(?:[, ]\d{3})++(?!\d)|\d++)(?:\.\d*+)?+|\.\d++"
_NUMBER = re.compile(
    rf"([-+]?)(?:(\d++) (?=\d+/))?({_DIGITS})(?:[eE]([-+]?\d{{1,2}}))?(?:\s?/\s?(\d++))?",
)
# Marks of typesetting, which have no value.
_MARKS = re.compile(r"\\(?:left|right|displaystyle)(?![a-z])|(?<!\\)\\[()\[\],!; ]|\*\*|\\?[$€£]|~")
_FRACTION = re.compile(r"^([-+]?\d*)\s*\\[dt]?frac\s*(?:\{(\d+)\}\{(\d+)\}|(\d)\s*(\d))$")
_TEXT_GROUP = re.compile(r"\\(?:text|mathrm|mbox|textbf|operatorname|begin|end)\s*\{[^{}]*\}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_VULGAR_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_UNITS = frozenset(["mm", "cm", "dm", "m", "km", "mg", "g", "kg", "ms", "s", "min", "h", "ml", "l"])


class Part(NamedTuple):
    """The answer in a text, and whether `\\boxed{}` or `####` marks it."""

    text: str
    marked: bool


def final_answer(text: str) -> Part:
    """Return what the last `\\boxed{}` or `####` (GSM8K, arXiv 2110.14168) marks, or the text.

    A box that is not closed counts as an empty answer.
    """
    marks, box = text.rfind("####"), text.rfind(BOXED)
    if box > marks:
        return Part(_inside(text[box + len(BOXED) :]), True)
    if marks >= 0:
        after = text[marks + 4 :].strip()
        return Part(after.splitlines()[0] if after else "", True)
    return Part(text.strip(), False)


def _inside(text: str) -> str:
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:at]
    return ""


def exact_number(text: str) -> Fraction | None:
    """Return the value of a text that is one number and nothing else, or None.

    Thousands may have commas or spaces. Decimals, exponents of two digits, fractions and mixed
    numbers (3 1/2) are read.
    """
    text = _cleaned(text)
    if fraction := _FRACTION.match(text):
        whole, *parts = fraction.groups()
        above, below = [part for part in parts if part is not None]
        sign = "-" if whole.startswith("-") else ""
        text = f"{whole} {above}/{below}" if whole.strip("+-") else f"{sign}{above}/{below}"
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    sign, whole, digits, exponent, below = found.groups()
    try:
        plain = digits.replace(",", "").replace(" ", "").removesuffix(".")
        value = Fraction(f"{plain}e{exponent or 0}") / Fraction(below or 1) + Fraction(whole or 0)
    except (ValueError, ZeroDivisionError):  # more digits than Python reads, or a division by 0
        return None
    return -value if sign == "-" else value


def _cleaned(text: str) -> str:
    """Return a text without `$`, spaces of LaTeX, bold and a full stop at its end."""
    for mark, plain in (("{,}", ","), ("\u2212", "-"), ("\u00a0", " "), ("\\,", " ")):
        text = text.replace(mark, plain)
    fraction = lambda one: " " + normalize("NFKC", one[0]).replace("\u2044", "/")  # noqa: E731
    text = _VULGAR_FRACTION.sub(fraction, text)
    return " ".join(_MARKS.sub("", text).split()).removesuffix(".").strip()


def check_reference(text: str) -> None:
    """Raise `RequestError` unless a reference is a number or a readable expression."""
    part = final_answer(text)
    if _reference_number(part.text) is not None:
        return
    request = _as_request(part)
    readable = bool(part.text and request[1] and _ask({"read": request}))
    expected = (
        "a number or an expression with reward number, alone, in \\boxed{} or after "
        "####; reward exact compares texts"
    )
    expect(readable, "answer", part.text[:80], expected)


def same_value(answer: str, reference: str) -> bool:
    """Return whether the final answer in a text has the value of that in a reference.

    A comparison that takes longer than `SECONDS` is False, with a notice.
    """
    given, wanted = final_answer(answer), final_answer(reference)
    if not given.text or len({_unit(given.text), _unit(wanted.text)} - {None}) == 2:
        return False
    number, right = exact_number(given.text), _reference_number(wanted.text)
    if number is None and given.marked:
        number = _first_number(given.text)
    if number is not None and right is not None:
        return number == right
    if right is not None:
        wanted = Part(f"{right.numerator}/{right.denominator}", True)
    same = _ask({"same": [*_as_request(wanted), *_as_request(given)]})
    if same is None:
        slow = f"comparing {given.text[:60]!r} took more than {SECONDS} s"
        notice(f"reward number: {slow}; it counts as wrong")
    return bool(same)


def _reference_number(text: str) -> Fraction | None:
    """Return the value of a reference that is a number, with or without words (`42 apples`)."""
    number = exact_number(text)
    words = re.search(r"[A-Za-z].*", _cleaned(text))
    only_words = words is not None and re.fullmatch(r"[A-Za-z .]+", words[0]) is not None
    return _first_number(text) if number is None and only_words else number


def _unit(text: str) -> str | None:
    """Return the unit of length, mass, time or volume at the end of a text, or None."""
    last = _cleaned(text).rpartition(" ")[2]
    return last if last in _UNITS else None


def _first_number(text: str) -> Fraction | None:
    """Return the number before the first word of a marked answer, as GSM8K's code does."""
    found = re.match(r"(\S+)\s+[A-Za-z]{2,}", _cleaned(text))
    return None if found is None else exact_number(found[1])


def _as_request(part: Part) -> tuple[str, bool]:
    """Return (text, whether it is LaTeX) for the worker; prose is not LaTeX."""
    cleaned = _cleaned(part.text)
    words = _WORD.findall(_TEXT_GROUP.sub("", cleaned))
    longest = max(map(len, words), default=0)
    is_prose = longest > 3 if part.marked else bool(words)
    if is_prose:
        return part.text.replace("\\$", ""), False  # the sign of money is not LaTeX
    number = exact_number(part.text)
    # The library reads 1e5 as 1 * e * 5 and 1 000 as 1 * 0.
    return (cleaned, True) if number is None else (f"{number.numerator}/{number.denominator}", True)


# -- the process -----------------------------------------------------------------------------------


def require_math_verify() -> None:
    """Raise `RequestError` unless `math-verify` is installed."""
    try:
        missing = importlib.util.find_spec("math_verify") is None
    except ValueError:  # the module is blocked by None in `sys.modules`
        missing = True
    needs = "needs math-verify: pip install 'transom[math]'"
    require(not missing, "finetune.reward", "number", needs)


@cache
def _worker() -> Worker:
    return Worker("transom.training.rl.math_worker")


def _ask(request: dict[str, Any]) -> bool | None:
    """Return the answer of the process that runs math-verify, or None if it takes too long."""
    require_math_verify()
    return _worker().ask(request, SECONDS)
