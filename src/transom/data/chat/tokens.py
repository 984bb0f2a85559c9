"""The tokens of encoded examples one by one, with their loss weights, for people to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transom.data.chat.turns import EncodedChat
from transom.tokenizers.tokenizer import Tokenizer


class RowToken(NamedTuple):
    """One token of a row.

    Attributes:
        segment: The number of its example in the row.
        position: Its place in the example.
        id: Its id.
        text: Its text.
        weight: Its loss weight as a target.
        mark: `BOS`, `EOS`, `end of turn`, `control`, or nothing.
    """

    segment: int
    position: int
    id: int
    text: str
    weight: float
    mark: str


def row_tokens(
    row: Sequence[EncodedChat], tokenizer: Tokenizer, ends: Sequence[int] = ()
) -> Iterator[RowToken]:
    """Yield the tokens of the examples of one row. `ends` are the ids that end a turn."""
    for segment, one in enumerate(row):
        for position, (id, weight) in enumerate(zip(one.ids.tolist(), one.weights, strict=True)):
            known = {"BOS": [tokenizer.bos_id], "EOS": [tokenizer.eos_id], "end of turn": ends}
            mark = ", ".join(name for name, ids in known.items() if id in ids)
            mark = mark or ("control" if id in tokenizer.special_ids else "")
            text = tokenizer.token_text(id)
            yield RowToken(segment, position, id, text, float(weight), mark)
