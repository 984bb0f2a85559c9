"""A SentencePiece model file (`ModelProto`), read and written without a library for protobuf.

Source: sentencepiece_model.proto of SentencePiece, and the encoding of protocol buffers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Types of pieces; GGUF has the same numbers for its tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # the character that pieces have for a space
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of the file
_BPE = 2
_NUMBER, _LENGTH, _FLOAT = 0, 2, 5  # how a field is stored: the low three bits of its key
_SIZES = {1: 8, _FLOAT: 4}


@dataclass(frozen=True)
class SentencePieceFile:
    """A model of SentencePiece that merges pairs by score.

    Attributes:
        spellings: The spelling of every piece, in the order of the ids.
        scores: The score of every piece. The pair that makes the piece of the highest score is
            merged first.
        types: The type of every piece; one is `UNKNOWN`.
        ids: The ids of `unk`, `bos`, `eos` and `pad`, as far as there are any. Only for writing.
        add_dummy_prefix: Whether a text gets a space before it.
        remove_extra_whitespaces: Whether spaces at the ends and repeated spaces are left out.
        merges: Whether it does merge pairs; other models cannot be written.
        normalizes: Whether it replaces characters by others; such a model cannot be written.
    """

    spellings: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    ids: Mapping[str, int] = field(default_factory=dict)
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    merges: bool = True
    normalizes: bool = False

    def to_bytes(self) -> bytes:
        """Return the content of the file, with byte fallback if there are byte pieces."""
        pieces = [
            # the score is field 2, and the type is field 3
            _encode(1, spelling) + struct.pack("<BfBB", 2 << 3 | _FLOAT, score, 3 << 3, type)
            for spelling, score, type in zip(self.spellings, self.scores, self.types, strict=True)
        ]
        trainer = _encode(3, _BPE) + _encode(35, BYTE in self.types)
        for place, role in enumerate(("unk", "bos", "eos", "pad")):
            id = self.ids.get(role)
            trainer += _encode(40 + place, -1 if id is None else id)
            trainer += _encode(45 + place, f"<no {role}>" if id is None else self.spellings[id])
        spaces = _encode(3, self.add_dummy_prefix) + _encode(4, self.remove_extra_whitespaces)
        normalizer = _encode(1, "identity") + spaces
        whole = [*(_encode(_PIECE, piece) for piece in pieces), _encode(_TRAINER, trainer)]
        return b"".join((*whole, _encode(_NORMALIZER, normalizer)))

    @classmethod
    def of(cls, content: bytes) -> SentencePieceFile:
        """Return the model in a file that the library has opened."""
        fields = list(_decode(content))
        pieces = [dict(_decode(value)) for number, value in fields if number == _PIECE]
        trainer, normalizer = (
            {key: one for number, part in fields if number == wanted for key, one in _decode(part)}
            for wanted in (_TRAINER, _NORMALIZER)
        )
        return cls(
            [piece[1].decode() for piece in pieces],
            [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces],
            [piece.get(3, NORMAL) for piece in pieces],
            add_dummy_prefix=bool(normalizer.get(3, True)),
            remove_extra_whitespaces=bool(normalizer.get(4, True)),
            merges=trainer.get(3) == _BPE,
            normalizes=bool(normalizer.get(2)),  # a compiled map of characters
        )


def _encode(number: int, value: bytes | str | int) -> bytes:
    """Return a field: an integer is a varint, and text and bytes come after their length."""
    if isinstance(value, int):
        return _varint(number << 3 | _NUMBER) + _varint(value % (1 << 64))
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | _LENGTH) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _decode(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of every field: integers, and anything else as bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = content[place]
            place, value, shift = place + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while place < len(content):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == _NUMBER:
            yield number, varint()
        else:
            size = varint() if kind == _LENGTH else _SIZES[kind]
            yield number, content[place : place + size]
            place += size
