"""Mistral's tekken.json: control tokens, ranked bytes, and the pattern of words."""

from __future__ import annotations

from typing import Any

from transom.base.errors import RequestError, expect
from transom.tokenizers.backend import AddedToken
from transom.tokenizers.byte_pairs import BytePairBackend, add_rank

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
# The control tokens of files that do not name any (tekken v3), in the order of their ids
# (mistral-common).
UNNAMED = (
    UNK, BOS, EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", PAD, "[IMG_BREAK]", "[IMG_END]",
    "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
LAST_UNNAMED_VERSION = 7
# The library gives up on a run of white space of about a million characters; Mistral's own code
# cuts nothing.
LONGEST_RUN = 400_000


def tekken_backend(data: dict[str, Any], source: str) -> BytePairBackend:
    """Return the vocabulary in a tekken.json; ids are rank + number of control tokens."""
    config, where = _entry(data, "config", dict, source), f"{source}: config"
    size = _entry(config, "default_vocab_size", int, where)
    count = _entry(config, "default_num_special_tokens", int, where)
    version = _entry(config, "version", str, where)
    added = {name: AddedToken(id) for id, name in enumerate(_control(data, count, version, source))}
    vocabulary = _entry(data, "vocab", list, source)
    least, most = count + 256, count + len(vocabulary)
    expected = f"{least} to {most}: control tokens and entries of `vocab`"
    expect(least <= size <= most, f"{source}: default_vocab_size", size, expected)
    return BytePairBackend(
        _ranks(vocabulary[: size - count], source),
        _entry(config, "pattern", str, where),
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
    """Return control tokens in the order of their ids; those without a name are `<SPECIAL_i>`."""
    where = f"{source}: special_tokens"
    entries = data.get("special_tokens")
    if entries is None:
        number = version.removeprefix("v")
        old = number.isdigit() and int(number) <= LAST_UNNAMED_VERSION
        expect(old, where, None, f"a list of them in version {version}")
        names = list(UNNAMED)
    else:
        expect(isinstance(entries, list), where, entries, "a list")
        names = [_entry(entry, "token_str", str, where) for entry in entries]
        ranks = [_entry(entry, "rank", int, where) for entry in entries]
        ordered = ranks == list(range(len(ranks)))
        expect(
            ordered,
            f"{source}: ranks of special_tokens",
            ranks,
            "0, 1, 2, ... in this order",
        )
    expected = f"the number of special_tokens ({len(names)}) or more"
    expect(len(names) <= count, f"{source}: default_num_special_tokens", count, expected)
    names += [f"<SPECIAL_{id}>" for id in range(len(names), count)]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    expect(twice is None, where, twice, "each name once")
    return names


def _ranks(vocabulary: list[Any], source: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for place, entry in enumerate(vocabulary):
        where = f"{source}: vocab entry {place}"
        spelled, rank = _entry(entry, "token_bytes", str, where), _entry(entry, "rank", int, where)
        token = add_rank(ranks, spelled, rank, where)
        # Programs that read the file may count on the ids of single bytes.
        if place < 256 and token != bytes([place]):
            raise RequestError(f"{where}: bytes: got {token!r}; expected the byte 0x{place:02X}")
    return ranks


def _entry(data: Any, key: str, kind: type, where: str) -> Any:
    """Return `data[key]`, which must be of this kind."""
    value = data.get(key) if isinstance(data, dict) else None
    expect(type(value) is kind, f"{where}: {key}", value, _KINDS[kind])
    return value


_KINDS = {dict: "a JSON object", list: "a JSON list", str: "text", int: "an integer"}
