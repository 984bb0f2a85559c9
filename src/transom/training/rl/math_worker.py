"""The child process in which math-verify compares answers.

SymPy may compute for hours or fill the memory on a text of a model (9^{9^{9^9}}). The time limit of
math-verify is a signal, which needs the main thread and does not end a computation in C. A process
can be ended.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from transom.base.worker import serve

MEMORY_BYTES = 4 << 30
ROUNDING = 12  # digits after the point: 0.333333 is not 1/3
LONGEST_NAME = 1  # letters of a variable; a longer symbol is a word


def main() -> None:
    """Answer {"read": [text, as_latex]} and {"same": [text, as_latex] * 2} until input ends."""
    logging.disable(logging.CRITICAL)
    # Imports must not count against the time of the first request.
    _same(_parse("2", True), _parse(r"\sqrt{4}", True))
    serve(_answer, MEMORY_BYTES)


def _answer(request: dict[str, Any]) -> bool:
    try:
        if "read" in request:
            return _is_mathematics(*request["read"])
        one, other = request["same"][:2], request["same"][2:]
        return _same(_parse(*one), _parse(*other))
    except Exception:  # the parser's generated code may raise anything
        return False


@lru_cache(maxsize=4096)
def _parse(text: str, as_latex: bool) -> tuple[Any, ...]:
    """Return what math-verify reads in a text: an expression and its forms, or nothing."""
    from math_verify import LatexExtractionConfig, parse

    if as_latex:  # all of the text or nothing, or the factor of an incomplete root would be read
        latex = [LatexExtractionConfig()]
        return tuple(parse(f"${text}$", latex, fallback_mode="no_fallback", parsing_timeout=None))
    return tuple(parse(text, fallback_mode="no_fallback", parsing_timeout=None))


def _same(reference: tuple[Any, ...], answer: tuple[Any, ...]) -> bool:
    from math_verify import verify

    options = {"float_rounding": ROUNDING, "timeout_seconds": None}
    return bool(verify(list(reference), list(answer), **options))


def _is_mathematics(text: str, as_latex: bool) -> bool:
    """Return whether a text is read as an expression that equals itself, and not as a word."""
    found = _parse(text, as_latex)
    symbols = getattr(found[0], "free_symbols", ()) if found else ()
    words = any(len(symbol.name) > LONGEST_NAME and symbol.name.isalpha() for symbol in symbols)
    spelled = as_latex and len(symbols) >= 3 and any(len(word) > 3 for word in _plain_words(text))
    return bool(found) and not words and not spelled and _same(found, found)


def _plain_words(text: str) -> list[str]:
    """Return the words of a text that are not LaTeX commands.

    math-verify reads `many` as m * a * n * y.
    """
    letters = "".join(letter if letter.isalpha() or letter == "\\" else " " for letter in text)
    return [word for word in letters.split() if "\\" not in word]


if __name__ == "__main__":
    main()
