"""How to evaluate: windows, generation, and when a generated text is right. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transom.base.errors import RequestError, require


@dataclass(frozen=True)
class Matching:
    """How a text is compared with the accepted answers; spaces around both never count."""

    extract: re.Pattern[str] | None = (
        None  # its last match counts, of that its first group where it has one
    )
    ignore_case: bool = False

    def found(self, text: str) -> str | None:
        """What a generated text answers; None where there is nothing that `extract` looks for."""
        if self.extract is None:
            return text.strip()
        matches = list(self.extract.finditer(text))
        if not matches:
            return None
        groups = [group for group in matches[-1].groups() if group is not None]
        return (groups[0] if groups else matches[-1][0]).strip()

    def right(self, found: str | None, answers: Sequence[str]) -> bool:
        """Whether what was found is one of the answers."""
        return found is not None and self._plain(found) in {
            self._plain(answer.strip()) for answer in answers
        }

    def _plain(self, text: str) -> str:
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True)
class EvalArgs:
    """How to evaluate; `window` and `stride` in tokens, None for the defaults, `limit` in documents
    or rows.
    """

    window: int | None = None
    stride: int | None = None
    max_new_tokens: int = 128
    extract: str | None = None
    ignore_case: bool = False
    stop: tuple[str, ...] = ()
    batch_tokens: int = 4096
    limit: int | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("window", "stride", "max_new_tokens", "batch_tokens", "limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "expected 1 or more")
        self.matching  # noqa: B018 - a pattern that is none is refused before a model is loaded

    @property
    def matching(self) -> Matching:
        """How generated texts are compared."""
        try:
            return Matching(
                None if self.extract is None else re.compile(self.extract), self.ignore_case
            )
        except re.error as error:
            raise RequestError(
                f"extract: got {self.extract!r}; expected a regular expression ({error})"
            ) from None
