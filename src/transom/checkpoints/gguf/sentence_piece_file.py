"""The fields of a SentencePiece model file (`ModelProto`), without a library of protocol buffers.

Source: sentencepiece_model.proto of SentencePiece, and the encoding of protocol buffers.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

# Types of pieces; GGUF has the same numbers for its tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # the character that pieces have for a space
_BPE = 2


def model_bytes(
    spellings: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    ids: Mapping[str, int],
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
) -> bytes:
    """Return the file of a model of byte pairs by score, with byte fallback if it has byte pieces.

    Args:
        spellings: The spelling of every piece, in the order of the ids.
        scores: The score of every piece. The pair of the highest score is merged first.
        types: The type of every piece; one is `UNKNOWN`.
        ids: The ids of `unk`, `bos`, `eos` and `pad`, as far as there are any.
        add_dummy_prefix: Whether a text gets a space before it.
        remove_extra_whitespaces: Whether spaces at the ends and repeated spaces are left out.
    """
    entries = [
        # the score is field 2, in four bytes, and the type is field 3, a number
        _field(1, _field(1, spelling) + struct.pack("<BfBB", 2 << 3 | 5, score, 3 << 3, type))
        for spelling, score, type in zip(spellings, scores, types, strict=True)
    ]
    trainer = [_field(3, _BPE), _field(35, BYTE in types)]
    for place, role in enumerate(("unk", "bos", "eos", "pad")):
        trainer.append(_field(40 + place, ids.get(role, -1)))
        trainer.append(_field(45 + place, spellings[ids[role]] if role in ids else f"<no {role}>"))
    spaces = _field(3, add_dummy_prefix) + _field(4, remove_extra_whitespaces)
    normalizer = _field(1, "identity") + spaces
    return b"".join((*entries, _field(2, b"".join(trainer)), _field(3, normalizer)))


def _field(number: int, value: bytes | str | int) -> bytes:
    """Return a field: an integer is a varint, and text and bytes come after their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value % (1 << 64))
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
