"""The model that is evaluated, and the facts that identify it in a report."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError
from transom.base.files import sha256_of
from transom.base.runtime import dtype_name
from transom.checkpoints.fingerprint import fingerprint
from transom.checkpoints.load import Offloader
from transom.checkpoints.open_model import OpenedModel, open_model
from transom.inference.room import keeps_every_token
from transom.quantize.leaves import parameter_count


@dataclass(frozen=True, kw_only=True)
class EvalModel(OpenedModel):
    """An opened model that predicts the next token."""

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        chat_template: str | None = None,
        keep_quantized: bool | None = None,
        offload: Offloader | None = None,
    ) -> EvalModel:
        """Open a model for evaluation; the arguments are those of `open_model`.

        Raises:
            RequestError: The model cannot be opened, or does not predict the next token: it has a
                head, or its layers see later tokens.
        """
        opened = open_model(
            name,
            revision=revision,
            device=device,
            dtype=dtype,
            chat_template=chat_template,
            keep_quantized=keep_quantized,
            offload=offload,
        )
        args, where = opened.model.args, opened.location
        if args.head is not None:
            raise RequestError(f"{where}: head: got {args.head.kind!r}; expected a language model")
        if any(layer.rule.kind == "full" for layer in args.layers):
            raise RequestError(
                f"{where}: layers see later tokens (pattern B); expected a model that predicts them"
            )
        return cls(
            name=opened.name,
            location=where,
            tokenizer=opened.tokenizer,
            model=opened.model,
            chat_template=chat_template,
        )

    @property
    def longest(self) -> int | None:
        """The maximum sequence length in tokens; None if no layer keeps all of them."""
        args = self.model.args
        return args.max_seq_len if keeps_every_token(args) else None

    @property
    def prefix(self) -> int | None:
        """The token before a text without context: BOS, else EOS, as in lm-evaluation-harness."""
        return self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id

    def facts(self) -> dict[str, Any]:
        """Return what identifies the model in a report.

        These are its name and folder, hashes of weights, arguments, adapter and vocabulary, the
        dtype and the device.
        """
        args = self.model.args
        adapter = self.location.adapter
        settings = json.dumps(args.to_dict(), sort_keys=True).encode()
        return {
            "model": self.name,
            "folder": str(self.location),
            "fingerprint": fingerprint(self.location.model),
            "args_sha256": hashlib.sha256(settings).hexdigest(),
            "adapter_sha256": None if adapter is None else adapter_hash(adapter),
            "tokenizer_hash": self.tokenizer.hash,
            "parameters": parameter_count(self.model),
            "dtype": dtype_name(self.model.dtype),
            "device": str(self.model.device),
        }


def adapter_hash(folder: Path) -> str:
    """Return a SHA-256 over the names and hashes of an adapter's config and weights."""
    files = sorted(one for name in ("adapter_*", "lora.safetensors") for one in folder.glob(name))
    hashes = "".join(f"{file.name} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()
