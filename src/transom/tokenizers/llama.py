"""Llama 3 and Llama 4 files: the ranks of byte pairs, one `base64 rank` on each line.

The patterns, the control tokens and their order are those of Meta's code (llama-models,
llama3/tokenizer.py and llama4/tokenizer.py). The ids of control tokens follow the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from transom.base.errors import expect
from transom.tokenizers.backend import AddedToken
from transom.tokenizers.byte_pairs import BytePairBackend, add_rank

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
    """What a file of ranks does not contain.

    Attributes:
        name: The name of the family.
        pattern: The regular expression of words.
        named: Control tokens in the order of their ids, except reserved ones at the end.
        control_count: The number of all control tokens.
        ranks: The number of ranks in the published file.
        first_reserved: The number in the name of the first reserved token at the end.
        pad: The PAD token.
        stops: Control tokens besides EOS that end a turn.
    """

    name: str
    pattern: str
    named: tuple[str, ...]
    control_count: int
    ranks: int
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


def _tokens(names: str) -> list[str]:
    return [f"<|{name}|>" for name in names.split()]


LLAMA3 = LlamaFamily(
    name="llama3",
    pattern=LLAMA3_WORDS,
    named=(
        *_tokens("begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1"),
        *_tokens("finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id"),
        *_tokens("python_tag image"),
    ),
    control_count=256,
    ranks=128_000,
    first_reserved=2,
    pad="<|finetune_right_pad_id|>",
    stops=("<|eom_id|>", "<|eot_id|>"),
)
_TEXT, _VISION, _REASONING = "text_post_train_", "vision_", "reasoning_"
LLAMA4 = LlamaFamily(
    name="llama4",
    pattern=LLAMA4_WORDS,
    named=(
        *_tokens("begin_of_text end_of_text fim_prefix fim_middle fim_suffix"),
        *_tokens("header_start header_end eom eot step"),
        *_reserved(_TEXT, range(6)),
        *_tokens("python_start python_end finetune_right_pad"),
        *_reserved(_TEXT, range(8, 69)),
        *_tokens("image_start image_end"),
        *_reserved(_VISION, range(2)),
        *_tokens("tile_x_separator tile_y_separator"),
        *_reserved(_VISION, range(2, 6)),
        *_tokens("image"),
        *_reserved(_VISION, range(6, 7)),
        *_tokens("patch"),
        *_reserved(_VISION, range(7, 1048)),
        *_reserved(_REASONING, range(8)),
        *_tokens("reasoning_thinking_start reasoning_thinking_end"),
    ),
    control_count=2048,
    ranks=200_000,
    first_reserved=0,
    pad="<|finetune_right_pad|>",
    stops=("<|eom|>", "<|eot|>"),
)
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def llama_backend(
    content: bytes, source: str, vocab_size: int | None
) -> tuple[BytePairBackend, LlamaFamily]:
    """Return the vocabulary in a file of ranks, and its family.

    Args:
        content: The content of the file.
        source: The file, for messages.
        vocab_size: The vocabulary size of the model, which tells Llama 3 from Llama 4.
    """
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
    """Return the ranks of all byte strings in a file of `base64 rank` lines.

    Raises:
        RequestError: For a line of another form.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if line:
            words = line.split()
            right = len(words) == 2 and words[1].isdigit()
            expect(right, f"{source}: line {number}", line, "`base64 rank`")
            add_rank(ranks, words[0], int(words[1]), f"{source}: line {number}")
    return ranks


def _family_of(ranks: int, source: str, vocab_size: int | None) -> LlamaFamily:
    """Return the family whose control tokens fill the vocabulary or whose file has these ranks."""
    families = (LLAMA3, LLAMA4)
    fitting = [family for family in families if ranks + family.control_count == vocab_size]
    fitting += [family for family in families if family.ranks == ranks]
    sizes = ", ".join(f"{ranks + family.control_count} ({family.name})" for family in families)
    expected = f"{sizes} with {ranks} ranks"
    expect(bool(fitting), f"{source}: vocab_size of the model", vocab_size, expected)
    return fitting[0]
