"""Make a new vocabulary of byte pairs, characters or bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from transom.base.errors import expect
from transom.base.interrupts import Background
from transom.tokenizers.fast import FastBackend, mark_special
from transom.tokenizers.llama import LLAMA3_WORDS
from transom.tokenizers.tokenizer import Tokenizer

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>")
UNKNOWN_TOKEN = "<|unknown|>"
# Training counts pairs within words, and each merge copies the rest of a word: a word of n
# characters costs n^2. Words of ordinary text are far shorter; longer ones (a line of dashes, a
# genome) are cut for training only.
LONGEST_WORD = 1000


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    progress: bool = False,
) -> Tokenizer:
    """Train byte-level BPE. The same texts give the same vocabulary. Ctrl-C ends it at once.

    Args:
        texts: The texts to count pairs in.
        vocab_size: The number of ids: the special tokens, 256 bytes, then merges.
        special_tokens: Control tokens, of which the first is BOS and the second EOS.
        progress: Print a progress bar.

    Raises:
        RequestError: If the texts are too small for that many merges.
    """
    smallest = 256 + len(special_tokens)
    expected = f"{smallest} (256 bytes and the specials) or more"
    expect(vocab_size >= smallest, "vocab_size", vocab_size, expected)
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{LONGEST_WORD}}}"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pieces, letters])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    _train(backend, texts, trainer)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    reached = backend.get_vocab_size()
    expected = f"at most {reached}, which is all that this text supports"
    expect(reached == vocab_size, "vocab_size", vocab_size, expected)
    return _finished(backend, special_tokens)


def _train(backend: tokenizers.Tokenizer, texts: Iterable[str], trainer: trainers.Trainer) -> None:
    """Train in a thread, since the main thread handles signals only between Python steps."""
    stopped = threading.Event()

    def feed() -> Iterator[str]:
        for text in texts:
            if stopped.is_set():
                return
            yield text

    try:
        Background(lambda: backend.train_from_iterator(feed(), trainer)).result()
    finally:
        stopped.set()


def train_chars(texts: Iterable[str], special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Return a tokenizer with one id for each character of the texts.

    Characters are in the order of their code points. Encoding another character raises
    `RequestError`.
    """
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    expect(bool(characters), "texts", "", "at least one character")
    tokens = [*special_tokens, UNKNOWN_TOKEN, *sorted(characters)]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    mark_special(backend, [UNKNOWN_TOKEN])
    return _finished(backend, special_tokens)


def byte_tokenizer(special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Return a tokenizer whose ids are the values of UTF-8 bytes."""
    vocabulary = {letter: byte for byte, letter in enumerate(byte_letters())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend, special_tokens)


def _finished(backend: tokenizers.Tokenizer, special_tokens: Sequence[str]) -> Tokenizer:
    """Return the tokenizer. Other programs that read its file add BOS, as with Llama 3."""
    expected = "two or more: BOS, EOS, others"
    expect(len(special_tokens) >= 2, "special_tokens", tuple(special_tokens), expected)
    mark_special(backend, special_tokens)
    bos, eos = special_tokens[:2]
    begin = (bos, backend.token_to_id(bos))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[begin]
    )
    return Tokenizer(FastBackend(backend), bos=bos, eos=eos)


def byte_letters() -> list[str]:
    """Return the letter that GPT-2's byte-level vocabularies write for each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
