"""Small vocabularies of other libraries, and their metadata as GGUF files have it."""

import json

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from tests.tokenizers.makers import CORPUS, NASTY

CONTROL = ["<|begin|>", "<|end|>", "<|turn|>"]
PLAIN = ["<think>", "   "]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = TEKKEN.replace(r"\p{N}|", r"\p{N}{1,3}|").replace(
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
).replace(
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
)  # fmt: skip
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def _cut(pattern):
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _letters(words=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)


# The pre-tokenizers of published tokenizer.json files, and what `tokenizer.ggml.pre` calls them.
PUBLISHED = {
    "gpt-2": [_letters(words=True)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _letters(words=True)],
    "llama-bpe": [_cut(LLAMA3), _letters()],
    "smaug-bpe": [_cut(LLAMA3), _letters()],
    "qwen2": [_cut(QWEN2), _letters()],
    "tekken": [_cut(TEKKEN), _letters()],
    "gpt-4o": [_cut(O200K), _letters()],
    "deepseek-v3": [
        _cut(r"\p{N}{1,3}"), _cut("[一-龥\u3040-ゟ\u30a0-ヿ]+"), _cut(DEEPSEEK3), _letters(),
    ],
    "falcon": [
        pre_tokenizers.Punctuation("contiguous"), _letters(words=True), _cut("[0-9][0-9][0-9]"),
    ],
}  # fmt: skip
IGNORE_MERGES = ("llama-bpe", "tekken")


def byte_pairs(pre: str = "gpt-2", vocab_size: int = 420) -> tokenizers.Tokenizer:
    """A tokenizer.json of byte pairs with control tokens first and plain added tokens last."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(PUBLISHED[pre])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([*CORPUS * 3, *NASTY], trainer)
    library.model.ignore_merges = pre in IGNORE_MERGES
    library.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    library.encode_special_tokens = True
    return library


def byte_pairs_metadata(library: tokenizers.Tokenizer, pre: str = "gpt-2", **changes) -> dict:
    """What a GGUF file states about such a tokenizer, with keys of `tokenizer.ggml` changed."""
    tokens = [library.id_to_token(id) for id in range(library.get_vocab_size())]
    types = dict.fromkeys(CONTROL, 3) | dict.fromkeys(PLAIN, 4)
    stated = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [types.get(token, 1) for token in tokens],
        "merges": [" ".join(pair) for pair in json.loads(library.to_str())["model"]["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (stated | changes).items()}


def sentence_piece_metadata(content: bytes, **changes) -> dict:
    """What a GGUF file states about a SentencePiece model, with keys changed."""
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    kinds = (model.is_unknown, model.is_control, model.is_unused, model.is_byte)
    ids = range(model.get_piece_size())
    types = {
        id: type for id in ids for has, type in zip(kinds, (2, 3, 5, 6), strict=True) if has(id)
    }
    stated = {
        "model": "llama",
        "tokens": [model.id_to_piece(id) for id in ids],
        "scores": [model.get_score(id) for id in ids],
        "token_type": [types.get(id, 1) for id in ids],
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (stated | changes).items()}


def pieces_in_json(content: bytes, prefix: str) -> tokenizers.Tokenizer:
    """A SentencePiece model as transformers writes it into a tokenizer.json: pairs by score.

    `prefix` is what puts a space before a text: `Prepend`, `Metaspace` or nothing.
    """
    stated = sentence_piece_metadata(content)
    tokens, types = stated["tokenizer.ggml.tokens"], stated["tokenizer.ggml.token_type"]
    scores = dict(zip(tokens, stated["tokenizer.ggml.scores"], strict=True))
    merges = [
        (scores[token], cut, (token[:cut], token[cut:]))
        for token, type in zip(tokens, types, strict=True)
        for cut in range(1, len(token))
        if type == 1 and token[:cut] in scores and token[cut:] in scores
    ]
    ordered = [pair for _, _, pair in sorted(merges, key=lambda one: one[:2], reverse=True)]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    library = tokenizers.Tokenizer(
        models.BPE(vocabulary, ordered, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    if prefix == "Prepend":
        spaces = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    if prefix == "Metaspace":
        library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        library.normalizer = spaces
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library
