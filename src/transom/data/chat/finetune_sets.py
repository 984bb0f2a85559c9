"""The examples of a data set for fine-tuning, to train on and to measure with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from transom.base.errors import Problem, WorkError, notice
from transom.data.chat.conversations import FORMATS, ChatExample, ExampleKind
from transom.data.chat.instructions import NAME as STDLIB
from transom.data.data_sets import rows_of, splits_of
from transom.data.row_kinds import read_as
from transom.data.text.sources import held_out


def read_examples(
    name: str | Path, split: str = "train", problems: list[Problem] | None = None
) -> Iterator[ChatExample]:
    """Return the examples of one split, which all have the same format.

    A notice counts the keys that are not read.

    Args:
        name: A file, a folder, `stdlib-docs`, or a name of the `datasets` library.
        split: `train`, `valid` or `test`.
        problems: Receives the malformed rows. If it is None, the first of them raises an error.

    Raises:
        RequestError: The data has no such split or no rows, or a row is malformed.
    """
    return read_as(name, rows_of(name, split), FORMATS, problems)


@dataclass(eq=False)
class Examples:
    """Examples of one split, read again from the files in every iteration.

    A large set therefore does not have to fit into memory.

    Attributes:
        name: The data set, as for `read_examples`.
        split: `train`, `valid` or `test`.
        held_out: None for the whole split, otherwise whether its held-out part is meant.
        fraction: The share of examples that is held out.
        count: How many examples there are.
        kinds: The id of the first example of each kind.
        needs_template: Whether one of them is a conversation.
    """

    name: str | Path
    split: str = "train"
    held_out: bool | None = None
    fraction: float = 0.0
    count: int = 0
    kinds: dict[ExampleKind, str] = field(default_factory=dict)
    needs_template: bool = False
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, example: ChatExample) -> None:
        """Count an example that was read for the first time."""
        self.count += 1
        self.kinds.setdefault(example.kind, example.id)
        self.needs_template |= example.needs_template
        self._digest.update(repr(example).encode(errors="surrogatepass"))

    @property
    def sha256(self) -> str:
        """Return the hash in hex of all examples, in order."""
        return self._digest.hexdigest()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[ChatExample]:
        again = Examples(self.name)
        for example in read_examples(self.name, self.split, []) if self.count else ():
            if self.held_out in (None, _is_held_out(example, self.fraction)):
                again.add(example)
                yield example
        if again.sha256 != self.sha256:
            raise WorkError(f"{self.name}: the examples changed while they were read; run it again")


def find_examples(
    name: str | Path, split: str = "train", problems: list[Problem] | None = None
) -> Examples:
    """Read one split of a data set, as `read_examples` does, and return its examples."""
    out = Examples(name, split)
    for example in read_examples(name, split, problems):
        out.add(example)
    return out


def split_examples(
    name: str | Path, fraction: float, problems: list[Problem] | None = None
) -> tuple[Examples, Examples]:
    """Read a data set, and return the examples to train on and the held-out examples.

    The split `valid` is held out if the data has one. Otherwise a `fraction` of `train` is, by the
    hash of the ids, unless nothing would be left to train on.
    """
    splits = splits_of(name)
    if "test" in splits:
        notice(f"{name}: the split test is not used")
    if "valid" in splits:
        return find_examples(name, "train", problems), find_examples(name, "valid", problems)
    train, measured = (Examples(name, "train", part, fraction) for part in (False, True))
    for example in read_examples(name, "train", problems):
        (measured if _is_held_out(example, fraction) else train).add(example)
    return (train, measured) if train else (replace(measured, held_out=None), Examples(name))


def _is_held_out(example: ChatExample, fraction: float) -> bool:
    """Return whether an example is held out. All examples of one docstring are in the same part."""
    stdlib = example.id.startswith(f"{STDLIB}:")
    return held_out(example.id.partition("#")[0] if stdlib else example.id, fraction)
