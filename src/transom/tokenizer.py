"""Tokenizers: read from the files of a model, or made from texts."""

from __future__ import annotations

from transom.tokenizers.stream import StreamDecoder
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import SPECIAL_TOKENS, byte_tokenizer, train_bpe, train_chars

__all__ = ["SPECIAL_TOKENS", "StreamDecoder", "Tokenizer", "byte_tokenizer", "train_bpe", "train_chars"]
