"""Silent bugs in reading and writing checkpoints, tokenizers and chats. The registry is `bugs.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.mutations.planting import Call, changed, changed_everywhere
from transom.chat.template import ChatTemplate
from transom.checkpoints import load, mapping, state
from transom.checkpoints.files.lazy_tensors import LazyTensor
from transom.models.llm import LLM
from transom.names import tables as names
from transom.names import transforms
from transom.names.tables import KeyMapping
from transom.tokenizers.tokenizer import Tokenizer


def permuted_query() -> AbstractContextManager[None]:
    """Loading puts the rows of queries into the order of the other RoPE layout."""

    def turned(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)

    def make(original: Call) -> Call:
        def open_parameters(*given: Any, **named: Any) -> dict[str, LazyTensor]:
            out: dict[str, LazyTensor] = original(*given, **named)
            return {name: one.then(turned) if ".wq." in name else one for name, one in out.items()}

        return open_parameters

    return changed_everywhere(state.open_parameters, make)


def unturned_query() -> AbstractContextManager[None]:
    """Writing into the other RoPE layout permutes keys, but not queries."""

    def make(original: Call) -> Call:
        return lambda name, tensor, *rest, **named: (
            tensor if ".wq." in name else original(name, tensor, *rest, **named)
        )

    return changed_everywhere(transforms.permute_rotary, make)


def untied_reading() -> AbstractContextManager[None]:
    """A folder with a tied output is loaded as two separate matrices."""

    def make(original: Call) -> Call:
        def loaded(*given: Any, **named: Any) -> LLM:
            model: LLM = original(*given, **named)
            if not model.args.tie_embeddings:
                return model
            apart = LLM(replace(model.args, tie_embeddings=False))
            state = model.state_dict()
            state["output.weight"] = state["tok_embeddings.weight"].clone()
            apart.load_state_dict(state, assign=True)
            apart.args = model.args
            return apart.eval()

        return loaded

    return changed_everywhere(load.load, make)


def swapped_widths() -> AbstractContextManager[None]:
    """Gate and value are swapped, in reading and in writing."""
    other = {"w_gate": "w_value", "w_value": "w_gate"}

    def swapped(name: str) -> str:
        *front, leaf, kind = name.split(".") if "." in name else ("", name, "")
        return ".".join((*front, other[leaf], kind)) if leaf in other else name

    def make(original: Call) -> Call:
        def expand(*given: Any) -> list[KeyMapping]:
            return [replace(move, ours=tuple(map(swapped, move.ours))) for move in original(*given)]

        return expand

    return changed_everywhere(names.expand, make)


def dropped_bias() -> AbstractContextManager[None]:
    """Biases count as read, but stay zero."""

    def make(original: Call) -> Call:
        def to_ours(*given: Any) -> dict[str, LazyTensor]:
            out: dict[str, LazyTensor] = original(*given)
            return {
                name: one.then(torch.zeros_like) if name.endswith(".bias") else one
                for name, one in out.items()
            }

        return to_ours

    return changed_everywhere(mapping.to_ours, make)


@contextlib.contextmanager
def double_bos_in_a_chat() -> Iterator[None]:
    """The tokenizer adds a BOS to a chat that its template began with one."""

    def ids(original: Call) -> Call:
        return lambda self, chat: [self.tokenizer.bos_id, *original(self, chat)]

    with (
        changed(ChatTemplate, "ids_of", ids),
        changed(ChatTemplate, "first_of", lambda original: lambda self, found: 0),
    ):
        yield


def obeyed_spelling() -> AbstractContextManager[None]:
    """A control token that a text or a message spells becomes that token."""

    def make(original: Call) -> Call:
        return lambda self, text, found, protected: original(self, text, self._all, ())

    return changed(Tokenizer, "_ids", make)
