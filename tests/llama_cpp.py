"""llama.cpp as a peer: tokens, logits and greedy answers of a GGUF file.

The package `xllamacpp` brings llama.cpp prebuilt. Its classes offer a server, which gives no logits
of a prompt, but its shared library exports the C functions of `llama.h`, which are called here.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path

import numpy as np


class _Params(ctypes.Structure):
    """Parameters of a model or a context, passed by value.

    It is larger than either structure of `llama.h`. The functions read and write only the part that
    they know, so the size does not have to follow the version.
    """

    _fields_ = [("bytes", ctypes.c_uint64 * 128)]


class _Batch(ctypes.Structure):
    """`llama_batch` of `llama.h`."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


_SIGNATURES = {
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (_Params, ()),
    "llama_context_default_params": (_Params, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, _Params)),
    "llama_init_from_model": (c_void_p, (c_void_p, _Params)),
    "llama_free": (None, (c_void_p,)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_tokenize": (
        c_int32,
        (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    ),
    "llama_batch_init": (_Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (c_int32, (c_void_p, _Batch)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
}
_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_silent = _LOG(lambda level, text, data: None)  # kept, since the library keeps a pointer to it


def installed() -> bool:
    """Return whether the package `xllamacpp` is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


def library() -> ctypes.CDLL:
    """Return the library, with the types of the functions that are used here."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    library = ctypes.CDLL(str(Path(spec.origin).with_name("xllamacpp.abi3.so")))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_silent, None)
    library.llama_backend_init()
    return library


class LlamaCpp:
    """A GGUF file as llama.cpp opens it.

    Args:
        path: The file, or the first file of a split model.
        context: The number of positions of the KV cache of one sequence. One call has at most this
            number of tokens of each.
        threads: The number of threads.
        sequences: The most sequences of one call.

    Raises:
        ValueError: llama.cpp does not open the file.
    """

    def __init__(self, path: str | Path, context: int = 512, threads: int = 2, sequences: int = 1):
        self.library = library()
        self.model = self.library.llama_model_load_from_file(
            str(path).encode(), self.library.llama_model_default_params()
        )
        if not self.model:
            raise ValueError(f"{path}: llama.cpp does not open this file")
        params = self.library.llama_context_default_params()
        # The first four fields are n_ctx, n_batch, n_ubatch and n_seq_max.
        fields = ctypes.cast(ctypes.pointer(params), POINTER(c_uint32))
        fields[0] = fields[1] = context * sequences
        fields[3] = sequences
        self.context = self.library.llama_init_from_model(self.model, params)
        self.library.llama_set_n_threads(self.context, threads, threads)
        self.vocabulary = self.library.llama_model_get_vocab(self.model)
        self.vocab_size: int = self.library.llama_vocab_n_tokens(self.vocabulary)
        self.batch = self.library.llama_batch_init(context * sequences, 0, 1)

    def close(self) -> None:
        """Free the memory of the model."""
        self.library.llama_batch_free(self.batch)
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokenize(self, text: str, *, frame: bool = False, special: bool = False) -> list[int]:
        """Return the tokens of a text.

        Args:
            text: The text.
            frame: Add the tokens that the file says to add, such as the one that begins a text.
            special: Read control tokens that are written out in the text.
        """
        raw = text.encode()
        ids = (c_int32 * (len(raw) + 8))()
        count = self.library.llama_tokenize(
            self.vocabulary, raw, len(raw), ids, len(ids), frame, special
        )
        assert count >= 0, count
        return list(ids[:count])

    def logits(self, tokens: Sequence[int], start: int = 0, *, last: bool = False) -> np.ndarray:
        """Return float32 logits [T, V] of T tokens at the positions from `start` on.

        The KV cache has the tokens before `start` from earlier calls. A call with start 0 clears
        it. With `last`, only those of the last token are computed: [1, V].
        """
        return self._decode([tokens], start, last=last).copy()

    def _decode(self, rows: Sequence[Sequence[int]], start: int, *, last: bool) -> np.ndarray:
        """Return the logits of rows of equal lengths, until the next call: [B * T, V] or [B, V]."""
        batch = self.batch
        if start == 0:
            self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        index = 0
        for sequence, tokens in enumerate(rows):
            for offset, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, start + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = not last or offset == len(tokens) - 1
                index += 1
        batch.n_tokens = index
        status = self.library.llama_decode(self.context, batch)
        assert status == 0, status
        found = self.library.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (len(rows) if last else index, self.vocab_size))

    def steps(self, prompts: Sequence[Sequence[int]], steps: int) -> Iterator[list[int]]:
        """Yield the tokens that greedy decoding appends to prompts of equal lengths, step by step.

        Args:
            prompts: The tokens of each sequence.
            steps: The number of tokens to append to each.
        """
        unread, start = prompts, 0
        for _ in range(steps):
            ids = self._decode(unread, start, last=True).argmax(-1).tolist()
            yield ids
            start += len(unread[0])
            unread = [[id] for id in ids]

    def greedy(self, prompt: Sequence[int], steps: int, stop: Sequence[int] = ()) -> list[int]:
        """Return the tokens that greedy decoding appends to a prompt, without the stop token.

        Args:
            prompt: The tokens of the prompt, one or more.
            steps: The most tokens to append, one or more.
            stop: The tokens that end an answer.
        """
        made: list[int] = []
        for (token,) in self.steps([prompt], steps):
            if token in stop:
                break
            made.append(token)
        return made
