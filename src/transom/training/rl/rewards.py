"""Rewards that can be checked: an answer's text and what is known of the right one, to a number. No
torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, WorkError, nearest, require
from transom.training.rl.math_answers import check_reference, require_math_verify, same_value

Reference = Mapping[
    str, Any
]  # what a row says of its answer: `answer` or `solution`, and for one's own `tests`
Score = Callable[[str, Reference], float]

SOLVED = 1.0  # a reward from which on a question counts as solved


@dataclass(frozen=True)
class Reward:
    """A reward by name; `file` is where one's own was found, None for what is built in."""

    name: str
    score: Score
    file: Path | None = None

    def __call__(self, answer: str, reference: Reference, id: str) -> float:
        """The reward of an answer to row `id`; whatever goes wrong names the row."""
        try:
            value = self.score(answer, reference)
        except Exception as error:  # one's own code may raise anything
            if self.file is None:
                raise RequestError(f"{id}: {error}") from None
            said = " ".join(str(error).split())[:160]
            raise WorkError(
                f"reward {self.name}: {id}: raises {type(error).__name__}: {said}"
            ) from error
        if not isinstance(value, Real) or not math.isfinite(value):
            raise WorkError(f"reward {self.name}: {id}: gives {value!r}; expected a finite number")
        return float(value)

    def check(self, references: Iterable[tuple[str, Reference]]) -> None:
        """Refuse rows, as pairs of id and reference, that a built-in reward cannot judge: before
        the first step.
        """
        if self.file is not None:
            return
        for id, reference in references:
            self("", reference, id)
            if self.score is number:
                try:
                    for one in accepted_answers(reference):
                        check_reference(one)
                except RequestError as error:
                    raise RequestError(f"{id}: {error}") from None

    @property
    def hash(self) -> str:
        """What a resumed run compares: SHA-256 in hex of the file of one's own, else the name."""
        return (
            self.name if self.file is None else hashlib.sha256(self.file.read_bytes()).hexdigest()
        )


def open_reward(name: str) -> Reward:
    """`exact`, `number`, `regex`, or `module:function` from a file in the current directory."""
    if name == "number":
        require_math_verify()
    if name in BUILT_IN:
        return Reward(name, BUILT_IN[name])
    module, _, function = name.partition(":")
    named = all(part.isidentifier() for part in (*module.split("."), function))
    expected = (
        f"expected {', '.join(BUILT_IN)}, or module:function of one's own{nearest(name, BUILT_IN)}"
    )
    require(named, "finetune.reward", name, expected)
    stem = Path.cwd().joinpath(*module.split("."))
    file = next(
        (one for one in (stem.with_suffix(".py"), stem / "__init__.py") if one.is_file()), None
    )
    if file is None:
        raise RequestError(f"finetune.reward: got {name!r}; there is no {stem}.py; {expected}")
    return Reward(name, _own(name, module, function, file), file)


def _own(name: str, module: str, function: str, file: Path) -> Score:
    """The function in `file`, which is run."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())[:160]
        raise RequestError(
            f"finetune.reward: got {name!r}; importing it raises {type(error).__name__}: {said}"
        ) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
    where = getattr(found, "__file__", None)
    same = where is not None and Path(where).resolve() == file.resolve()
    require(same, "finetune.reward", name, f"expected a module whose name no other has ({where})")
    score = getattr(found, function, None)
    functions = [
        key for key, value in vars(found).items() if callable(value) and not key.startswith("_")
    ]
    expected = f"expected a function of {file.name}{nearest(function, functions)}"
    require(callable(score), "finetune.reward", name, expected)
    assert callable(score), "required"
    return score


# -- built in
# ----------------------------------------------------------------------------------------


def exact(answer: str, reference: Reference) -> float:
    """1 where the answer is one of those accepted; white space and capitals do not count."""
    return float(_plain(answer) in {_plain(one) for one in accepted_answers(reference)})


def number(answer: str, reference: Reference) -> float:
    """Return 1 where the answer has the value of an accepted one: numbers, expressions, sets,
    intervals, ...
    """
    return float(any(same_value(answer, one) for one in accepted_answers(reference)))


def regex(answer: str, reference: Reference) -> float:
    """1 where one of the reference's patterns is found in the answer."""
    try:
        patterns = [re.compile(one) for one in accepted_answers(reference)]
    except re.error as error:
        raise RequestError(
            f"answer: valid only with reward regex is a regular expression ({error})"
        ) from None
    return float(any(pattern.search(answer) for pattern in patterns))


BUILT_IN: dict[str, Score] = {"exact": exact, "number": number, "regex": regex}


def accepted_answers(reference: Reference) -> list[str]:
    """`answer`, else `solution`, of a reference: a text or a number, or a list of them."""
    given = reference.get("answer", reference.get("solution"))
    answers = given if isinstance(given, list) else [given]
    fits = bool(answers) and all(
        isinstance(one, (str, int, float)) and str(one).strip() for one in answers
    )
    require(
        fits,
        "answer",
        given,
        "expected a text or a number, or a list of them, as answer or solution",
    )
    return [str(one) for one in answers]


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
