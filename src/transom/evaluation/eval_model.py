"""What is evaluated: a model with its tokenizer, its stop tokens and its chat template, and who it
is.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError
from transom.base.runtime import dtype_name, warn_if_bfloat16_is_slow
from transom.chat.fingerprint import warn_if_other
from transom.chat.template import ChatTemplate
from transom.checkpoints.files.folders import Found, find_model, sha256_of
from transom.checkpoints.fingerprint import fingerprint
from transom.checkpoints.load import load, open_tokenizer
from transom.inference.loop import keeps_every_token
from transom.inference.stopping import stop_tokens_of
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer


@dataclass
class Subject:
    """An opened model; `stop_tokens` are the folder's own, `chat_template` the name asked for, if
    any.
    """

    name: str
    found: Found
    model: LLM
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    chat_template: str | None = None

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        chat_template: str | None = None,
    ) -> Subject:
        """The model of a folder, run folder, adapter folder or hub id; one without a next token is
        refused.
        """
        found = find_model(name, revision)
        tokenizer = open_tokenizer(found)
        stop_tokens = stop_tokens_of(found, tokenizer)
        model = load(found, device, dtype)
        if model.args.head is not None:
            raise RequestError(
                f"{found}: head = {model.args.head.kind!r}; expected a language model"
            )
        if any(layer.rule.kind == "full" for layer in model.args.layers):
            raise RequestError(
                f"{found}: layers see later tokens (pattern B); expected a model that predicts them"
            )
        warn_if_bfloat16_is_slow(model.tok_embeddings.weight)
        return cls(str(name), found, model, tokenizer, stop_tokens, chat_template)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The template asked for, the adapter's or the model's own, or the one its vocabulary is
        made for.
        """
        template = ChatTemplate.find(self.found.folders, self.tokenizer, self.chat_template)
        warn_if_other(self.found.folders, self.tokenizer, template)
        return template

    @property
    def longest(self) -> int | None:
        """Tokens that a sequence may have; None where every layer forgets."""
        args = self.model.args
        return args.max_seq_len if keeps_every_token(args) else None

    @property
    def prefix(self) -> int | None:
        """The token in front of a text that has none in front: BOS, else EOS; as
        lm-evaluation-harness has it.
        """
        return self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text after the tokens that its tokenizer puts first; special tokens
        stay text.
        """
        return self.tokenizer.encode_prompt(text)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the weights, without an adapter's."""
        return fingerprint(self.found.model)

    def facts(self) -> dict[str, Any]:
        """Who this is: hashes of weights, settings, adapter and vocabulary, and in what numbers it
        ran.
        """
        weight, args = self.model.tok_embeddings.weight, self.model.args
        adapter = self.found.adapter
        settings = json.dumps(args.to_dict(), sort_keys=True).encode()
        return {
            "model": self.name,
            "folder": str(self.found),
            "fingerprint": self.fingerprint,
            "args_sha256": hashlib.sha256(settings).hexdigest(),
            "adapter_sha256": None if adapter is None else _hash_of_adapter(adapter),
            "tokenizer_hash": self.tokenizer.hash,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "dtype": dtype_name(weight.dtype),
            "device": str(weight.device),
        }


def _hash_of_adapter(folder: Path) -> str:
    """SHA-256 over the names and hashes of an adapter's settings and weights."""
    files = sorted(
        file for pattern in ("adapter_*", "lora.safetensors") for file in folder.glob(pattern)
    )
    return hashlib.sha256(
        "".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode()
    ).hexdigest()
