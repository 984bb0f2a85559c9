"""The pre-tokenizers that GGUF names (`tokenizer.ggml.pre`): how text is cut into words.

The names, and the patterns of each, are facts from llama.cpp (src/llama-vocab.cpp). Patterns that
llama.cpp respells for its own engine are written here as in the tokenizer.json of the models. Names
are left out if they need more than patterns, or belong to models of other architectures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

from transom.base.errors import expect
from transom.tokenizers.llama import LLAMA3_WORDS, LLAMA4_WORDS

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS, _WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"
_DIGIT, _DIGITS, _ONE_TO_THREE, _THREE = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", "[0-9][0-9][0-9]"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"  # `Punctuation` of the tokenizers library
_HAN_KANA, _HAN_HANGUL = (
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-"
    "ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-"  # noqa: RUF001
    "ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"  # noqa: RUF001
)


@dataclass(frozen=True)
class PreTokenizer:
    """How a vocabulary of byte pairs cuts text into words.

    Attributes:
        names: The names in GGUF files; files that are written get the first one.
        patterns: Regular expressions. Each cuts the pieces that the ones before have left, into its
            matches and what is between them.
        ignore_merges: Whether a word that is a token is not built from merges.
        adds_bos: Whether BOS is put before a text if the file does not state it.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Return the object of the tokenizers library, which turns bytes into letters last."""
        cuts = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in self.patterns]
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*cuts, letters])


PRE_TOKENIZERS = (
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        (LLAMA3_WORDS,),
        ignore_merges=True,
        adds_bos=True,
    ),
    PreTokenizer(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), (LLAMA3_WORDS,)),
    PreTokenizer(
        (
            "qwen2",
            "deepseek-r1-qwen",
            "stablelm2",
            "hunyuan",
            "megrez",
            "kormo",
            "f2llmv2",
            "grok-2",
            "solar-open",
        ),
        (_QWEN2,),
    ),
    PreTokenizer(
        ("qwen35",),
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        ),
    ),
    PreTokenizer(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), (LLAMA4_WORDS,)),
    PreTokenizer(
        ("tekken",),
        (LLAMA4_WORDS.replace(f"{_CONTRACTIONS}?", "").replace(_ONE_TO_THREE, _DIGIT),),
        ignore_merges=True,
        adds_bos=True,
    ),
    PreTokenizer(
        (
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ),
        (_DIGIT, GPT2_WORDS),
    ),
    PreTokenizer(
        (
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
        ),
        (GPT2_WORDS,),
    ),
    PreTokenizer(("default",), (_PUNCTUATION.replace("`", ""), GPT2_WORDS, _DIGITS, _THREE)),
    PreTokenizer(("falcon",), (_PUNCTUATION, GPT2_WORDS, _THREE)),
    PreTokenizer(
        ("deepseek-llm",),
        (
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _HAN_HANGUL,
            _DIGITS,
        ),
    ),
    PreTokenizer(("deepseek-coder",), (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, _DIGIT)),
    PreTokenizer(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        (_ONE_TO_THREE, _HAN_KANA, _DEEPSEEK3),
    ),
    PreTokenizer(
        ("minicpm5",),
        (_ONE_TO_THREE, rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_REST}"),
        ignore_merges=True,
    ),
    PreTokenizer(
        ("seed-coder",),
        (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",),
    ),
)
_BY_NAME = {name: one for one in PRE_TOKENIZERS for name in one.names}


def named_pre_tokenizer(name: str, field: str) -> PreTokenizer:
    """Return the pre-tokenizer of a name; `field` is the key that states it, for messages.

    Raises:
        RequestError: If the name is unknown. Another pre-tokenizer would give other token ids.
    """
    expected = f"one of the {len(_BY_NAME)} names whose pre-tokenizer is known"
    expect(name in _BY_NAME, field, name, expected)
    return _BY_NAME[name]


def matching_pre_tokenizer(
    entry: Mapping[str, Any] | None, ignore_merges: bool, field: str
) -> PreTokenizer:
    """Return the pre-tokenizer that cuts text as this entry of a tokenizer.json does.

    Args:
        entry: The entry `pre_tokenizer`.
        ignore_merges: That of the model; of several pre-tokenizers one that has the same is taken.
        field: Where the entry is, for messages.

    Raises:
        RequestError: If there is none.
    """
    patterns = tuple(_patterns(entry or {}, field))
    found = [one for one in PRE_TOKENIZERS if one.patterns == patterns]
    expect(bool(found), field, patterns, "patterns that GGUF has a name for")
    return next((one for one in found if one.ignore_merges == ignore_merges), found[0])


def _patterns(entry: Mapping[str, Any], field: str) -> Iterator[str]:
    """Yield the patterns of an entry and of those inside it, spelled as in `PRE_TOKENIZERS`."""
    kind = entry.get("type")
    split = entry.get("behavior"), entry.get("invert")
    pattern = entry.get("pattern", {}).get("Regex", "")
    if kind == "Sequence":
        for one in entry["pretokenizers"]:
            yield from _patterns(one, field)
    elif kind == "ByteLevel" and not entry["add_prefix_space"]:
        yield from (GPT2_WORDS,) if entry["use_regex"] else ()
    elif kind == "Digits":
        yield _DIGIT if entry["individual_digits"] else _DIGITS
    elif kind == "Punctuation" and split[0] == "Contiguous":
        yield _PUNCTUATION
    # A pattern that matches all text cuts the same if what is between matches is removed.
    elif split == ("Isolated", False) or (split == ("Removed", True) and pattern.endswith(r"\s+")):
        yield pattern.replace("\r", r"\r").replace("\n", r"\n")
    else:
        expect(False, field, kind, "a pre-tokenizer that GGUF has a name for")
