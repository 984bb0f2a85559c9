"""Silent bugs in fine-tuning. The registry is `bugs.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tests.mutations.planting import Call, changed, changed_everywhere
from transom.attention.mask import positions_from_sizes
from transom.data.batch import Batch
from transom.data.chat import batches as chat_batches
from transom.data.chat import rows as chat_rows
from transom.data.chat.turns import EncodedChat, Turns
from transom.layers.inputs import TransformerInput
from transom.layers.linear import GroupedLinear
from transom.lora import adapters as lora
from transom.lora import apply as new
from transom.lora import args as lora_args
from transom.lora import weights as lora_weights
from transom.lora.args import Scaling
from transom.lora.weights import Leaf, LoraWeights, output_norms, weight_delta
from transom.models.llm import LLM
from transom.training.loop.checkpoint_writer import TRAINED, AdapterWriter
from transom.training.loop.step import Stepper
from transom.training.losses import log_probs
from transom.training.losses.balance import RouterCounts, update_choice_biases

# -- what carries loss


def masked_end_of_turn() -> AbstractContextManager[None]:
    """The token that ends an answer has no loss, so that the model never learns to stop."""

    def make(original: Call) -> Call:
        def rows(self: Turns, messages: Any, tools: Any, weights: Any) -> list[EncodedChat]:
            made: list[EncodedChat] = original(self, messages, tools, weights)
            for row, answer in (
                (one, answer) for one in made for answer in one.answers if answer.ended
            ):
                row.weights[answer.stop - 1] = 0.0
            return made

        return rows

    return changed(Turns, "rows", make)


def masked_padding() -> AbstractContextManager[None]:
    """Every token with the id of the padding has no loss, also the EOS of an answer."""

    def make(original: Call) -> Call:
        def items(self: Any, *given: Any) -> list[tuple[EncodedChat, ...]]:
            made: list[tuple[EncodedChat, ...]] = original(self, *given)
            for row in (row for item in made for row in item):
                row.weights[row.ids == self.tokenizer.pad_id] = 0.0
            return made

        return items

    return changed(chat_rows.ChatEncoder, "_items", make)


def turn_too_early() -> AbstractContextManager[None]:
    """A question has the loss of its answer."""

    def make(original: Call) -> Call:
        def rows(self: Turns, messages: Any, tools: Any, weights: Any) -> list[EncodedChat]:
            made: list[EncodedChat] = original(self, messages, tools, weights)
            for row in made:
                begin = 1
                for answer in row.answers:
                    weight = row.weights[answer.start]
                    row.weights[answer.start : answer.stop] = 0.0
                    row.weights[begin : answer.start] = weight
                    begin = answer.stop
            return made

        return rows

    return changed(Turns, "rows", make)


def token_too_late() -> AbstractContextManager[None]:
    """A target has the weight of the token before it."""

    def make(original: Call) -> Call:
        return lambda row: original(EncodedChat(row.id, row.ids, np.roll(row.weights, 1)))

    return changed(chat_batches, "_shifted", make)


def lost_weights() -> AbstractContextManager[None]:
    """Every turn with a weight above 0 has weight 1."""
    return changed(chat_batches, "_unless_all_one", lambda original: lambda weights: None)


def seen_neighbours() -> AbstractContextManager[None]:
    """Examples of a packed row have positions from 0, but attend to each other."""

    def make(original: Call) -> Call:
        def inputs(self: Batch) -> TransformerInput:
            made: TransformerInput = original(self)
            if self.sizes is None:
                return made
            positions = positions_from_sizes(list(chain(*self.sizes)), self.tokens.device)
            return replace(made, sizes=None, tokens_position=positions)

        return inputs

    return changed(Batch, "inputs", make)


# -- what trains


def bare_experts() -> AbstractContextManager[None]:
    """The experts get no adapters."""

    def make(original: Call) -> Call:
        def leaves(model: LLM) -> dict[str, Leaf]:
            return {
                path: leaf
                for path, leaf in original(model).items()
                if not isinstance(leaf, GroupedLinear)
            }

        return leaves

    return changed(new, "leaves", make)


def trained_base() -> AbstractContextManager[None]:
    """The base is trained together with its adapter, and only the adapter is saved."""
    return changed_everywhere(lora.train_adapters, lambda original: lambda model, names: None)


def balanced_base() -> AbstractContextManager[None]:
    """The biases of frozen routers are updated, although no adapter stores them."""

    def make(original: Call) -> Call:
        def follow(self: Stepper, router: RouterCounts | None) -> None:
            original(self, router)
            moe = self.model.args.moe_args
            if moe is not None and moe.balance == "bias" and router is not None:
                update_choice_biases(self.model, router.picks_LE, moe.bias_update_rate)

        return follow

    return changed(Stepper, "_follow", make)


def plain_scale() -> AbstractContextManager[None]:
    """An adapter of rsLoRA is scaled by alpha / rank."""

    def make(original: Call) -> Call:
        def scale_of(scaling: Scaling, alpha: float, rank: int) -> float:
            made: float = original(
                "alpha_over_rank" if scaling == "rslora" else scaling, alpha, rank
            )
            return made

        return scale_of

    return changed_everywhere(lora_args.scale_of, make)


def learning_length() -> AbstractContextManager[None]:
    """DoRA's norm is differentiated instead of being a constant."""

    def make(original: Call) -> Call:
        def dora_factor(leaf: Leaf, own: LoraWeights) -> Tensor:
            assert own.magnitude is not None, "asked for DoRA only"
            return own.magnitude / output_norms(
                leaf, leaf.weight + own.scale * weight_delta(leaf, own)
            )

        return dora_factor

    return changed_everywhere(lora_weights.dora_factor, make)


def adapted_reference() -> AbstractContextManager[None]:
    """The reference of a preference loss keeps its adapter on."""

    @contextlib.contextmanager
    def adapters_off(model: LLM) -> Iterator[None]:
        yield

    return changed_everywhere(log_probs.adapters_off, lambda original: adapters_off)


def lost_adapter() -> AbstractContextManager[None]:
    """A resumed run starts with a new adapter and the old optimizer."""

    def make(original: Call) -> Call:
        def restore(
            self: AdapterWriter, folder: Path, tensors: MutableMapping[str, Tensor]
        ) -> None:
            for name in [name for name in tensors if name.startswith(TRAINED)]:
                del tensors[name]

        return restore

    return changed(AdapterWriter, "restore", make)
