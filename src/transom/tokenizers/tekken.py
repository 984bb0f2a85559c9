"""Mistral's tekken.json: ranked bytes, the pattern that cuts words, and the control tokens, which
come first.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from transom.base.errors import RequestError, require
from transom.tokenizers.backend import AddedToken
from transom.tokenizers.byte_pairs import BytePairBackend

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
# The control tokens of files that do not name any (tekken v3), in the order of their ids:
# mistral-common.
UNNAMED = (
    UNK, BOS, EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", PAD, "[IMG_BREAK]", "[IMG_END]", "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
LAST_UNNAMED_VERSION = 7
# The library gives up on a run of white space of about a million characters; Mistral's own code
# cuts nothing.
LONGEST_RUN = 400_000


def tekken_backend(data: dict[str, Any], source: str) -> BytePairBackend:
    """The vocabulary in the content of a tekken.json; ids are rank + number of control tokens."""
    config = _entry(data, "config", dict, source)
    size = _entry(config, "default_vocab_size", int, f"{source}: config")
    count = _entry(config, "default_num_special_tokens", int, f"{source}: config")
    version = _entry(config, "version", str, f"{source}: config")
    names = _control(data, count, version, source)
    added = {name: AddedToken(id) for id, name in enumerate(names)}
    vocabulary = _entry(data, "vocab", list, source)
    expected = (
        f"expected {count + 256} to {count + len(vocabulary)}: control tokens and entries of "
        f"`vocab`"
    )
    require(
        count + 256 <= size <= count + len(vocabulary),
        f"{source}: default_vocab_size",
        size,
        expected,
    )
    return BytePairBackend(
        _ranks(vocabulary[: size - count], source),
        _entry(config, "pattern", str, f"{source}: config"),
        added,
        source=source,
        format="tekken",
        frame=((added[BOS].id,), ()) if BOS in added else ((), ()),
        offset=count,
        version=version,
        unk_id=added[UNK].id if UNK in added else None,
        longest_run=LONGEST_RUN,
    )


def _control(data: dict[str, Any], count: int, version: str, source: str) -> list[str]:
    """Control tokens in the order of their ids; those that no name is given for are
    `<SPECIAL_i>`.
    """
    entries = data.get("special_tokens")
    if entries is None:
        number = version.removeprefix("v")
        old = number.isdigit() and int(number) <= LAST_UNNAMED_VERSION
        require(
            old,
            f"{source}: special_tokens",
            None,
            f"expected a list of them in version {version}",
        )
        names = list(UNNAMED)
    else:
        require(isinstance(entries, list), f"{source}: special_tokens", entries, "expected a list")
        names = [_entry(entry, "token_str", str, f"{source}: special_tokens") for entry in entries]
        ranks = [_entry(entry, "rank", int, f"{source}: special_tokens") for entry in entries]
        expected = "expected 0, 1, 2, ... in this order"
        require(
            ranks == list(range(len(ranks))), f"{source}: ranks of special_tokens", ranks, expected
        )
    expected = f"expected the number of special_tokens ({len(names)}) or more"
    require(len(names) <= count, f"{source}: default_num_special_tokens", count, expected)
    names += [f"<SPECIAL_{id}>" for id in range(len(names), count)]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    require(twice is None, f"{source}: special_tokens", twice, "expected each name once")
    return names


def _ranks(vocabulary: list[Any], source: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for place, entry in enumerate(vocabulary):
        where = f"{source}: vocab entry {place}"
        rank, spelled = _entry(entry, "rank", int, where), _entry(entry, "token_bytes", str, where)
        try:
            token = base64.b64decode(spelled, validate=True)
        except binascii.Error as error:
            raise RequestError(f"{where}: token_bytes: got {spelled!r}; expected base64") from error
        new = rank == place and token not in ranks
        require(new, f"{where}: rank", rank, f"expected new bytes of rank {place}")
        # Ids of bytes are fixed: whoever reads the file may count on them.
        byte = place >= 256 or token == bytes([place])
        require(byte, f"{where}: token_bytes", spelled, f"expected the byte 0x{place & 255:02X}")
        ranks[token] = place
    return ranks


def _entry(data: Any, key: str, kind: type, where: str) -> Any:
    """`data[key]`, which must be of this kind."""
    value = data.get(key) if isinstance(data, dict) else None
    if type(value) is not kind:
        raise RequestError(f"{where}: {key}: got {value!r}; expected {_KINDS[kind]}")
    return value


_KINDS = {dict: "a JSON object", list: "a JSON list", str: "text", int: "a whole number"}
