"""The files beside a vocabulary that describe its tokens: names, added tokens, ends of turns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transom.base.errors import expect
from transom.base.files import json_object
from transom.tokenizers.backend import AddedToken

CONFIG_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
DECODER = "added_tokens_decoder"  # in tokenizer_config.json: tokens by their ids
LISTS = ("extra_special_tokens", "additional_special_tokens")  # the first is the newer name
NAMED = ("bos_token", "eos_token", "pad_token")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ENDS = ("eot_token", "eom_token")  # names that some folders give to the end of a turn, of a message
STRIPPING = ("lstrip", "rstrip", "single_word")
FLAGS = (*STRIPPING, "normalized", "special")


@dataclass(frozen=True)
class TokenFiles:
    """The content of the files that describe the tokens of a folder's vocabulary.

    Attributes:
        folder: The folder, for messages.
        config: tokenizer_config.json.
        specials: special_tokens_map.json.
        ids: added_tokens.json, ids by spelling.
    """

    folder: Path
    config: Mapping[str, Any]
    specials: Mapping[str, Any]
    ids: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, files: Mapping[str, bytes]) -> TokenFiles:
        """Read the files of a folder, given by name; any of them may be missing."""
        names = (CONFIG_FILE, SPECIALS_FILE, ADDED_FILE)
        return cls(folder, *(json_object(files.get(name, b"{}"), folder / name) for name in names))

    @cached_property
    def named(self) -> dict[str, str | None]:
        """BOS, EOS and PAD as far as a file names them; null in a file means that there is none.

        tokenizer_config.json takes precedence over special_tokens_map.json.
        """
        named: dict[str, str | None] = {}
        for entries in (self.specials, self.config):
            for name in NAMED:
                token = spelling_of(entries.get(name))
                if token is not None or entries.get(name, "") is None:
                    named[name] = token
        return named

    @property
    def special(self) -> list[str]:
        """The BOS, EOS and PAD that a file names."""
        return [token for token in self.named.values() if token is not None]

    @cached_property
    def described(self) -> dict[int, dict[str, Any]]:
        """The entries of `added_tokens_decoder` by id, with the flags that they state."""
        where = f"{self.folder / CONFIG_FILE}: {DECODER}"
        entries = self.config.get(DECODER) or {}
        expect(isinstance(entries, dict), where, entries, "a JSON object")
        for id, entry in entries.items():
            right = (
                id.isdigit() and isinstance(entry, dict) and isinstance(entry.get("content"), str)
            )
            expect(
                right,
                f"{where}: {id}",
                entry,
                "a token id with an object that has `content`",
            )
        return {
            int(id): {**_flags(entry), "content": entry["content"]} for id, entry in entries.items()
        }

    @cached_property
    def old_added(self) -> dict[int, dict[str, Any]]:
        """The entries of added_tokens.json by id; those with a role in another file are special."""
        for spelling, id in self.ids.items():
            right = type(id) is int and id >= 0
            expect(right, f"{self.folder / ADDED_FILE}: {spelling}", id, "a token id")
        special = {spelling_of(one) for one in (*_tokens(self.specials), *_tokens(self.config))}
        return {
            id: {
                "content": spelling,
                "special": spelling in special,
                "normalized": spelling not in special,
            }
            for spelling, id in self.ids.items()
        }

    @property
    def added(self) -> dict[str, AddedToken]:
        """All tokens with an id by spelling, for a vocabulary without them."""
        return {
            entry["content"]: AddedToken(
                id, entry.get("special", False), *(entry.get(flag, False) for flag in STRIPPING)
            )
            for entries in (self.old_added, self.described)
            for id, entry in entries.items()
        }

    @cached_property
    def extra(self) -> list[dict[str, Any]]:
        """Entries without ids of special tokens whose role is not BOS, EOS or PAD."""
        found: dict[str, dict[str, Any]] = {}
        for entries in (self.config, *(() if self.described else (self.specials,))):
            for one in _tokens(entries, but=NAMED):
                if spelling := spelling_of(one):
                    found.setdefault(
                        spelling, {**_flags(one), "content": spelling, "special": True}
                    )
        return list(found.values())

    @property
    def ends(self) -> list[str]:
        """Tokens that a file names as ends of turns or messages."""
        named = self.config.get(LISTS[0])
        entries = {**self.config, **(named if isinstance(named, dict) else {})}
        return [spelling for name in ENDS if (spelling := spelling_of(entries.get(name)))]


def _flags(entry: Any) -> dict[str, bool]:
    stated = entry if isinstance(entry, dict) else {}
    return {flag: stated[flag] for flag in FLAGS if type(stated.get(flag)) is bool}


def _tokens(entries: Mapping[str, Any], but: Collection[str] = ()) -> Iterator[Any]:
    """Yield the tokens of all roles in a file, in the order in which transformers adds them."""
    listed: Any = next((entries[name] for name in LISTS if entries.get(name)), [])
    names = [role for role in entries if role.endswith("_token") and role not in but]
    for role in (
        *filter(names.__contains__, ROLES),
        *(role for role in names if role not in ROLES),
    ):
        yield entries[role]
    yield from listed.values() if isinstance(listed, dict) else listed


def spelling_of(entry: Any) -> str | None:
    """Return the spelling of a token that a file writes as text or as an object with `content`."""
    token = entry.get("content") if isinstance(entry, dict) else entry
    return token if isinstance(token, str) else None
