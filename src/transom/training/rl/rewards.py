"""Rewards that a program computes from the text of an answer and its reference.

This module does not import torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from transom.base.errors import (
    RequestError,
    WorkError,
    expect,
    explained,
    located,
    nearest,
    one_line,
    require,
)
from transom.training.rl.math_answers import check_reference, require_math_verify, same_value

# What a row has beside its prompt: `answer` or `solution`, and other keys for your own functions.
Reference = Mapping[str, Any]
RewardFunction = Callable[[str, Reference], float]

SOLVED = 1.0  # a question with this reward or more counts as solved


@dataclass(frozen=True)
class Reward:
    """A reward by name.

    Attributes:
        name: `exact`, `number`, `regex`, or `module:function`.
        function: Returns the reward of an answer.
        file: The file of your own function; None for a built-in one.
    """

    name: str
    function: RewardFunction
    file: Path | None = None

    def __call__(self, answer: str, reference: Reference, id: str) -> float:
        """Return the reward of an answer to row `id`.

        Raises:
            RequestError: A built-in reward cannot judge the row.
            WorkError: Your own function raises, or returns no finite number.
        """
        try:
            value = self.function(answer, reference)
        except Exception as error:  # your own code may raise anything
            if self.file is None:
                raise RequestError(f"{id}: {error}") from None
            raise WorkError(f"reward {self.name}: {id}: raises {one_line(error)}") from error
        if not isinstance(value, Real) or not math.isfinite(value):
            raise WorkError(f"reward {self.name}: {id}: gives {value!r}; expected a finite number")
        return float(value)

    def check(self, reference: Reference, id: str) -> None:
        """Raise `RequestError` if a built-in reward cannot judge row `id`."""
        if self.file is not None:
            return
        self("", reference, id)
        with located(id):
            for one in accepted_answers(reference) if self.function is number else ():
                check_reference(one)

    @property
    def hash(self) -> str:
        """The SHA-256 of the file of your own function, or the name; a resumed run compares it."""
        if self.file is None:
            return self.name
        return hashlib.sha256(self.file.read_bytes()).hexdigest()


def open_reward(name: str) -> Reward:
    """Return a built-in reward, or `module:function` from a file in the current directory.

    Raises:
        RequestError: There is no such reward, or importing its module raises.
    """
    if name == "number":
        require_math_verify()
    if name in BUILT_IN:
        return Reward(name, BUILT_IN[name])
    module, _, function = name.partition(":")
    expected = f"expected {', '.join(BUILT_IN)}, or module:function of your own"
    parts = (*module.split("."), function)
    fits = all(part.isidentifier() for part in parts)
    require(fits, "finetune.reward", name, expected + nearest(name, BUILT_IN))
    stem = Path.cwd().joinpath(*module.split("."))
    files = [one for one in (stem.with_suffix(".py"), stem / "__init__.py") if one.is_file()]
    require(bool(files), "finetune.reward", name, f"there is no {stem}.py; {expected}")
    return Reward(name, _imported(name, module, function, files[0]), files[0])


def _imported(name: str, module: str, function: str, file: Path) -> RewardFunction:
    """Return a function of `file`, which is imported from the current directory."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raised = f"importing it raises {one_line(error)}"
        raise RequestError(f"finetune.reward: got {name!r}; {raised}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
    where = getattr(found, "__file__", None)
    fits = where is not None and Path(where).resolve() == file.resolve()
    expect(fits, "finetune.reward", name, f"a module with a name of its own ({where})")
    functions = {key: one for key, one in vars(found).items() if callable(one) and key[0] != "_"}
    expected = f"a function of {file.name}{nearest(function, functions)}"
    expect(callable(getattr(found, function, None)), "finetune.reward", name, expected)
    return getattr(found, function)


# -- built in --------------------------------------------------------------------------------------


def exact(answer: str, reference: Reference) -> float:
    """Return 1 if the answer is an accepted one, white space and case aside, and 0 otherwise."""
    return float(_plain(answer) in map(_plain, accepted_answers(reference)))


def number(answer: str, reference: Reference) -> float:
    """Return 1 if the answer has the value of an accepted one, and 0 otherwise.

    Values are numbers, expressions, sets, intervals and so on; see `math_answers`.
    """
    return float(any(same_value(answer, one) for one in accepted_answers(reference)))


def regex(answer: str, reference: Reference) -> float:
    """Return 1 if a pattern of the reference matches somewhere in the answer, and 0 otherwise."""
    accepted = accepted_answers(reference)
    expected = "expected a regular expression with reward regex"
    with explained(f"answer: got {accepted}; {expected}", re.error):
        matches = [re.search(pattern, answer) for pattern in accepted]
    return float(any(matches))


BUILT_IN: dict[str, RewardFunction] = {"exact": exact, "number": number, "regex": regex}


def accepted_answers(reference: Reference) -> list[str]:
    """Return `answer`, or else `solution`, of a reference: a text, a number, or a list of them."""
    given = reference.get("answer", reference.get("solution"))
    answers = given if isinstance(given, list) else [given]
    fits = all(isinstance(one, (str, int, float)) and str(one).strip() for one in answers)
    expected = "a text or a number, or a list of them, as answer or solution"
    expect(bool(answers) and fits, "answer", given, expected)
    return [str(one) for one in answers]


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
