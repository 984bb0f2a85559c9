"""Llama 3 and Llama 4 files: ranks of byte pairs, one `base64 rank` a line; all else is known by
heart.

The patterns, the control tokens and their order are those of Meta's code (llama-models,
llama3/tokenizer.py and llama4/tokenizer.py); the file does not hold them. Control tokens follow the
ranks.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from transom.base.errors import RequestError
from transom.tokenizers.backend import AddedToken
from transom.tokenizers.byte_pairs import BytePairBackend

# The rule for cutting text into words before byte pairs are merged: contractions, words with one
# leading non-letter, digits in threes, punctuation, line ends, and spaces that leave the last one
# to a word.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words end where a capital follows a small letter, and keep their contraction.
LLAMA4_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Meta cuts runs of white space or of anything else at this many characters, and text at 400,000.
LONGEST_RUN, LONGEST_TEXT = 25_000, 400_000


@dataclass(frozen=True)
class LlamaFamily:
    """What a file of ranks leaves unsaid: how words are cut, and the control tokens behind the
    ranks.
    """

    name: str
    pattern: str
    named: tuple[str, ...]
    control_count: int  # named ones and reserved ones together
    ranks: int  # of the published file
    first_reserved: int
    pad: str
    stops: tuple[str, ...]

    @property
    def control(self) -> list[str]:
        """All control tokens in the order of their ids."""
        last = self.first_reserved + self.control_count - len(self.named)
        return [*self.named, *_reserved("", range(self.first_reserved, last))]


def _reserved(topic: str, numbers: range) -> list[str]:
    return [f"<|{topic}reserved_special_token_{number}|>" for number in numbers]


LLAMA3 = LlamaFamily(
    name="llama3",
    pattern=LLAMA3_WORDS,
    named=(
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>", "<|python_tag|>", "<|image|>",
    ),
    control_count=256,
    ranks=128_000,
    first_reserved=2,
    pad="<|finetune_right_pad_id|>",
    stops=("<|eom_id|>", "<|eot_id|>"),
)  # fmt: skip
_TEXT, _VISION, _REASONING = "text_post_train_", "vision_", "reasoning_"
LLAMA4 = LlamaFamily(
    name="llama4",
    pattern=LLAMA4_WORDS,
    named=(
        "<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>",
        "<|fim_suffix|>",
        "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>", *_reserved(_TEXT,
        range(6)),
        "<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>", *_reserved(_TEXT, range(8,
        69)),
        "<|image_start|>", "<|image_end|>", *_reserved(_VISION, range(2)), "<|tile_x_separator|>",
        "<|tile_y_separator|>", *_reserved(_VISION, range(2, 6)), "<|image|>", *_reserved(_VISION,
        range(6, 7)),
        "<|patch|>", *_reserved(_VISION, range(7, 1048)), *_reserved(_REASONING, range(8)),
        "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>",
    ),
    control_count=2048,
    ranks=200_000,
    first_reserved=0,
    pad="<|finetune_right_pad|>",
    stops=("<|eom|>", "<|eot|>"),
)  # fmt: skip
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def llama_backend(
    content: bytes, source: str, vocab_size: int | None
) -> tuple[BytePairBackend, LlamaFamily]:
    """The vocabulary in a file of ranks; `vocab_size`, the model's, tells Llama 3 from Llama 4."""
    ranks = read_ranks(content, source)
    family = _family_of(len(ranks), source, vocab_size)
    added = {token: AddedToken(len(ranks) + place) for place, token in enumerate(family.control)}
    backend = BytePairBackend(
        ranks,
        family.pattern,
        added,
        source=source,
        format="tiktoken",
        frame=((added[BOS].id,), ()),
        stops=family.stops,
        longest_run=LONGEST_RUN,
        longest_text=LONGEST_TEXT,
    )
    return backend, family


def read_ranks(content: bytes, source: str) -> dict[bytes, int]:
    """The ranks of all byte strings in a file of `base64 rank` lines; a bad line is a
    `RequestError`.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            token, place = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise RequestError(f"{source}: line {number}: expected `base64 rank`") from error
        if place != len(ranks) or token in ranks:
            raise RequestError(f"{source}: line {number}: expected new bytes of rank {len(ranks)}")
        ranks[token] = place
    return ranks


def _family_of(ranks: int, source: str, vocab_size: int | None) -> LlamaFamily:
    """The family whose control tokens fill up the vocabulary, else the one whose published file has
    these ranks.
    """
    families = (LLAMA3, LLAMA4)
    filled = [family for family in families if ranks + family.control_count == vocab_size]
    published = [family for family in families if family.ranks == ranks]
    for family in filled + published:
        return family
    sizes = ", ".join(f"{ranks + family.control_count} ({family.name})" for family in families)
    raise RequestError(
        f"{source}: vocab_size of the model: got {vocab_size}; accepted beside {ranks} ranks is "
        f"{sizes}"
    )
