"""`EvalArgs`: how to evaluate a model. This module does not import torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transom.base.fields import check_bounds, describe, regex


@dataclass(frozen=True)
class EvalArgs:
    """Settings of an evaluation. The description of each field says what it does."""

    window: int | None = describe(
        None,
        "text: tokens of context (default: max_seq_len, 4096 at most)",
        "tokens",
        at_least=1,
    )
    stride: int | None = describe(
        None, "text: tokens between windows (default: half a window)", "tokens", at_least=1
    )
    max_new_tokens: int = describe(128, "answers: most new tokens", "tokens", at_least=1)
    extract: str | None = describe(
        None, "answers: compare only the last match of this regular expression, or its group"
    )
    ignore_case: bool = describe(False, "answers: ignore upper and lower case")
    stop: tuple[str, ...] = describe((), "answers: end before this text; may be repeated")
    batch_tokens: int = describe(4096, "tokens per forward pass", "tokens", at_least=1)
    limit: int | None = describe(
        None, "use only the first N documents or rows of each", "rows", at_least=1
    )
    progress: bool = describe(False, "show a progress bar on standard error")

    def __post_init__(self) -> None:
        check_bounds(self)
        regex(self.extract or "", "extract")

    def answer_in(self, text: str) -> str | None:
        """Return the answer that a text gives, without spaces around it; None if there is none.

        It is the last match of `extract`, or the first group of that match if it has groups.
        """
        if self.extract is None:
            return text.strip()
        matches = list(re.finditer(self.extract, text))
        if not matches:
            return None
        groups = [group for group in matches[-1].groups() if group is not None]
        return (groups[0] if groups else matches[-1][0]).strip()

    def is_right(self, answer: str | None, accepted: Sequence[str]) -> bool:
        """Return whether an answer is one of the accepted ones, spaces around them aside."""
        return answer is not None and self._plain(answer) in map(self._plain, accepted)

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()
