"""A file of prompt states, which other processes reuse for prompts that begin alike.

It is a safetensors file with the nodes of a `PrefixCache`. Its metadata says what the states depend
on: the weights, their dtype, the adapters in use, the bits of the cache and the rotary frequencies.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from transom.base.errors import RequestError, WorkError, expect, explained, notice, require
from transom.base.runtime import dtype_name
from transom.cache.model_cache import ModelCache
from transom.cache.prefix import PrefixCache, PrefixNode
from transom.checkpoints.files.staging import staged
from transom.inference.decode_args import DecodeArgs
from transom.inference.room import prefix_bytes
from transom.lora.adapters import active_adapters
from transom.models.llm import LLM

VERSION = 1  # of the content of the files
FIELD, NAME = "prompt_cache_file", "transom"
SAMPLES = 64  # numbers of each weight that are hashed with their places


class PromptCache(PrefixCache):
    """The prefixes of a file, which is written once if it does not exist.

    Args:
        model: The model, whose weights must not change.
        decode: `prompt_cache_file` and `kv_bits`.
        slack: As of a `PrefixCache`.

    Raises:
        RequestError: The file is that of another model, of other settings or another version, or
            damaged; or it does not exist and its folder can't be written.
    """

    def __init__(self, model: LLM, decode: DecodeArgs, *, slack: int = 32) -> None:
        super().__init__(model.args, max_bytes=sys.maxsize, slack=slack)
        assert decode.prompt_cache_file is not None, "a file is named"
        self.path = Path(decode.prompt_cache_file).expanduser()
        self.variant = active_adapters(model)
        self.facts = {
            "version": VERSION,
            "dtype": dtype_name(model.dtype),
            "kv_bits": decode.kv_bits,
            "weights": weights_hash(model),
        }
        self.found = self.path.exists()
        if self.found:
            self._load()
        else:
            self._check_folder()

    def restore(self, cache: ModelCache, prompts: Sequence[Sequence[int]]) -> list[int]:
        """As in a `PrefixCache`. A notice tells how many tokens of a file are reused."""
        counts = super().restore(cache, prompts)
        if self.found:
            total = sum(map(len, prompts))
            notice(f"{self.path}: {sum(counts):,} of {total:,} prompt tokens are reused")
        return counts

    def completed(self) -> None:
        """Write the file after the first prefill unless it exists; a notice tells of a failure."""
        if not self.found:
            self.found = True
            try:
                self.save()
            except (RequestError, WorkError) as error:
                notice(str(error))

    def save(self) -> None:
        """Write everything that is stored into the file, completely or not at all.

        Raises:
            RequestError: Another process writes it.
            WorkError: It could not be written.
        """
        tensors: dict[str, Tensor] = {}
        numbers: dict[PrefixNode | None, int] = {}
        nodes: list[dict[str, Any]] = []
        for key, node in self.nodes():
            numbers[node] = number = len(nodes)
            names = [[f"{number}.{i}.{j}" for j in range(len(x))] for i, x in enumerate(node.parts)]
            pairs = zip(itertools.chain(*names), itertools.chain(*node.parts), strict=True)
            tensors |= {name: x.cpu() for name, x in pairs}
            parent = numbers.get(node.parent)
            nodes.append({"key": key, "parent": parent, "tokens": node.tokens, "parts": names})
        sums = {name: checksum(x) for name, x in tensors.items()}
        text = json.dumps({"facts": self.facts, "nodes": nodes, "sums": sums})
        with staged(self.path, file=self.path.name) as folder:
            save_file(tensors, folder / self.path.name, {NAME: text, "sha256": _sha256(text)})

    def _load(self) -> None:
        """Read the nodes of the file, whose tensors are views of its memory map."""
        shown, broken = str(self.path), "expected a complete file of prompt states, or a new name"
        expect(not self.path.is_dir(), FIELD, shown, "a file, not a folder")
        damaged = explained(f"{FIELD}: got {shown!r}; {broken}", SafetensorError, OSError)
        with damaged, safe_open(self.path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata.get(NAME, "")
        require(metadata.get("sha256") == _sha256(text), FIELD, shown, broken)
        content = json.loads(text)
        for name, ours in self.facts.items():
            theirs = content["facts"].get(name)
            expect(theirs == ours, f"{FIELD}: {shown}: {name}", theirs, f"{ours!r} for this model")
        sums = {name: checksum(x) for name, x in tensors.items()}
        require(content["sums"] == sums, FIELD, shown, broken)
        nodes: list[PrefixNode] = []
        for one in content["nodes"]:
            variant, bits, chosen = one["key"]
            root = self.roots.setdefault((tuple(variant), bits, tuple(chosen)), PrefixNode())
            parent = root if one["parent"] is None else nodes[one["parent"]]
            parts = tuple(tuple(tensors[name] for name in row) for row in one["parts"])
            end = parent.end + len(one["tokens"])
            nodes.append(PrefixNode(tuple(one["tokens"]), parent, parts, end))
            self.insert(nodes[-1])

    def _check_folder(self) -> None:
        expected = "expected a file in a folder that can be written"
        with explained(f"{FIELD}: got {str(self.path)!r}; {expected}", OSError):
            tempfile.TemporaryFile(dir=self.path.parent).close()


def conversation_prefixes(model: LLM, decode: DecodeArgs) -> PrefixCache | None:
    """Return the prefix cache of a conversation: that of `prompt_cache_file`, or a new one.

    Without a file, and without windows or chunks, it is None: the KV cache can always be rolled
    back.
    """
    if decode.prompt_cache_file is not None:
        return PromptCache(model, decode)
    if not any(layer.rule.size for layer in model.args.layers):
        return None
    return PrefixCache(model.args, max_bytes=prefix_bytes(model.device))


def weights_hash(model: LLM) -> str:
    """Return a hash of the arguments and weights of a model in memory, 16 hex digits.

    It has a checksum over every number and some numbers with their places, so that it takes about
    as long as one forward call of one token.
    """
    out = hashlib.sha256(json.dumps(model.args.to_dict(), sort_keys=True).encode())
    for name, x in model.state_dict().items():
        some = x.detach().flatten()[:: max(1, x.numel() // SAMPLES)]
        samples = some.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        out.update(f"{name} {x.dtype} {tuple(x.shape)} {checksum(x)} ".encode() + samples)
    return out.hexdigest()[:16]


def checksum(x: Tensor) -> int:
    """Return the sum of the bits of a tensor as integers of 64 bits, or of 8 if they don't fit."""
    kind = torch.uint8 if x.nbytes % 8 else torch.int64
    return int(x.detach().contiguous().flatten().view(kind).sum())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
