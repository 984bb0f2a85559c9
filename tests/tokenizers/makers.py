"""Small vocabulary files of every kind, made on the spot, and texts that break tokenizers."""

import base64
import io
import json
import random
from pathlib import Path

import sentencepiece

from transom.tokenizers.stream import StreamDecoder
from transom.tokenizers.training import byte_letters, train_bpe

CORPUS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs.\r\n\n  def f(x):\n\treturn x\n",
    "hello world and hello again, héllo wörld and do and do",
    "naïve café Ωμέγα Привет мир 漢字かな交じり文",
]
NASTY = [
    "",
    " ",
    "  two  spaces and a tail  ",
    " leading",
    "tabs\tand\r\nlines\n\n\n",
    "naïve café e\u0301 a\u0308 — Ωμέγα Привет мир",
    "漢字かな交じり文 한국어 ภาษาไทย नमस्ते",
    "👍🏽 👩\u200d👩\u200d👧 🇩🇪 😀😀 end",
    "aB" * 300 + " " * 300 + "1234567" * 50 + "\n" * 70 + "^" * 90,
    "<s>hello</s> [INST] do [/INST] <unk> <pad> <0x41> <0x0A>",
    "<|begin_of_text|>and<|end_of_text|><|eot_id|><|header_start|> <|reserved_special_token_5|>",
    "▁ and ▁▁do", "\u2047 \ufffd \x00 \x01\x7f\x85 \u00a0\u2003\u2028x\ufeffy",
    "\U0010ffff \U000e0041 \u0378",
    "\uff26\uff35\uff2c\uff2c \uff1cs\uff1e ﬁ ① ½",
]  # fmt: skip
MISTRAL_CONTROL = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]


def sentencepiece_model(**options) -> bytes:
    """A BPE model with byte fallback as Llama 2 and Mistral have it; `options` go to the
    trainer.
    """
    writer = io.BytesIO()
    settings = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    lines = [line for text in CORPUS for line in text.split("\n")] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=writer, **(settings | options)
    )
    return writer.getvalue()


def byte_ranks(size: int = 380) -> dict[bytes, int]:
    """Ranks of `size` byte strings, all 256 bytes first."""
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    backend = json.loads(train_bpe(CORPUS, size + 2)._backend.to_json())
    vocabulary = sorted(backend["model"]["vocab"].items(), key=lambda entry: entry[1])
    tokens = [bytes(letters[letter] for letter in token) for token, id in vocabulary if id >= 2]
    tokens = [bytes([byte]) for byte in range(256)] + [token for token in tokens if len(token) > 1]
    return {token: rank for rank, token in enumerate(tokens)}


def rank_file(ranks: dict[bytes, int]) -> bytes:
    """What Llama 3 and Llama 4 call tokenizer.model."""
    return b"".join(
        base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()
    )


def tekken_file(
    ranks: dict[bytes, int], *, named: list[str] | None, control: int, version: str, pattern: str
) -> str:
    """A tekken.json with more entries than it uses, as the published ones have."""
    special = [
        {"rank": id, "token_str": name, "is_control": True} for id, name in enumerate(named or [])
    ]
    return json.dumps(
        {
            "config": {
                "pattern": pattern,
                "num_vocab_tokens": len(ranks),
                "default_vocab_size": len(ranks) - 7 + control,
                "default_num_special_tokens": control,
                "version": version,
            },
            "vocab": [
                {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
                for token, rank in ranks.items()
            ],
            **({} if named is None else {"special_tokens": special}),
        }
    )


def write(folder: Path, **files: bytes | str | dict) -> Path:
    """`folder` with these files; dots are written `__` in the names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content) if isinstance(content, dict) else content
        data = text.encode() if isinstance(text, str) else text
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def streamed(tokenizer, ids: list[int], **options) -> list[str]:
    """The pieces that a streaming decoder gives, the rest last."""
    stream = StreamDecoder(tokenizer, **options)
    return [*(stream.push(id) for id in ids), stream.finish()]


def nonsense(tokenizer, count: int, seed: int = 0) -> list[list[int]]:
    """Rows of 30 ids that a broken model might say."""
    generator = random.Random(seed)
    ids = [id for id in range(tokenizer.vocab_size) if tokenizer.id_to_token(id) is not None]
    return [generator.choices(ids, k=30) for _ in range(count)]
