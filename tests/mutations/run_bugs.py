"""Silent bugs in caches, data and training. The registry is `bugs.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.mutations.planting import Call, changed, changed_everywhere, lost
from transom.cache.model_cache import ModelCache
from transom.cache.prefix import PrefixCache
from transom.cache.store import LayerCache, Placement, RotatingBufferCache, StaticCache
from transom.data.batch import NO_TARGET, Batch
from transom.data.order import Batches
from transom.data.text import batches
from transom.inference import speculate
from transom.inference.sampler import Sampler
from transom.inference.speculate import Proposal
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.loop.step import Stepper
from transom.training.losses.log_probs import target_log_probs
from transom.training.losses.objectives import NextToken
from transom.training.optim.ema import Ema
from transom.training.optim.optimizers import Optimizers
from transom.verify.tiny_runs import BYTE_VOCABULARY

# -- stores


def stale_slot() -> AbstractContextManager[None]:
    """A slot of a ring keeps its old token under a new position."""

    def make(original: Call) -> Call:
        def write(self: LayerCache, states: tuple[Tensor, ...], call: Placement) -> None:
            before = [x[:, 0].clone() for x in self.states]
            used = any(bool(x.any()) for x in before)
            original(self, states, call)
            if used:  # its position is new, its states are those of the round before
                for x, old in zip(self.states, before, strict=True):
                    x[:, 0] = old

        return write

    return changed(LayerCache, "_write", make)


def stale_scale() -> AbstractContextManager[None]:
    """A slot gets the 8-bit codes of a new token and keeps the scale of another."""

    def make(original: Call) -> Call:
        def write(self: LayerCache, states: tuple[Tensor, ...], call: Placement) -> None:
            before = [x.clone() for x in self.scales]
            original(self, states, call)
            for x, old in zip(self.scales, before, strict=True):
                x.copy_(torch.where(old > 0, old, x.roll(1, 1)))

        return write

    return changed(LayerCache, "_write", make)


def overwriting_prefill() -> AbstractContextManager[None]:
    """A chunk longer than the slack is written before it is read."""

    def make(original: Call) -> Call:
        def begin_call(
            self: RotatingBufferCache, positions: Tensor, bound: int, *, first: bool
        ) -> None:
            if first:
                original(self, positions, bound, first=first)
                return
            index = self._write(positions, positions >= 0)
            self.placement = Placement(*index, self.positions_BS[:, :-1])

        return begin_call

    return changed(RotatingBufferCache, "begin_call", make)


def short_view() -> AbstractContextManager[None]:
    """The last slot of a bucket is missing from the view."""

    def make(original: Call) -> Call:
        def begin_call(self: StaticCache, positions: Tensor, bound: int, *, first: bool) -> None:
            original(self, positions, bound, first=first)
            assert self.placement is not None
            if not first:
                shown = self.placement.positions_BS[:, :-1]
                self.placement = replace(self.placement, positions_BS=shown)

        return begin_call

    return changed(StaticCache, "begin_call", make)


def short_snapshot() -> AbstractContextManager[None]:
    """A stored prefix lacks the oldest token that the window of the next one reaches."""

    def make(original: Call) -> Call:
        def init(self: PrefixCache, *args: Any, **options: Any) -> None:
            original(self, *args, **options)
            # A window of W reads W - 1 earlier tokens.
            self.kept = [min(kept, kept - self.slack - 2) for kept in self.kept]

        return init

    return changed(PrefixCache, "__init__", make)


def longer_prefix() -> AbstractContextManager[None]:
    """A prompt continues the states of another after their first different token."""

    def make(original: Call) -> Call:
        def match(self: PrefixCache, tokens: Sequence[int], cache: ModelCache) -> Any:
            node, count = original(self, tokens, cache)
            return node, min(count + 1, node.end, len(tokens))

        return match

    return changed(PrefixCache, "match", make)


def unverified_proposals() -> AbstractContextManager[None]:
    """The first proposed token is accepted unseen."""

    def make(original: Call) -> Call:
        def verify(sampler: Sampler, logits: Tensor, proposal: Proposal, stops: Any) -> list[int]:
            found: list[int] = original(sampler, logits, proposal, stops)
            return [*proposal.ids[:1], *found[1:]] or found

        return verify

    return changed_everywhere(speculate.verify, make)


# -- data and training


def double_bos() -> AbstractContextManager[None]:
    """The tokenizer adds a BOS to documents that get one anyway."""

    def make(original: Call) -> Call:
        return lambda self, found: [[self.bos_id, *ids] for ids in original(self, found)]

    return changed(Tokenizer, "encode_batch", make)


def masked_eos() -> AbstractContextManager[None]:
    """The end of a document is never a target."""

    def make(original: Call) -> Call:
        def targets(window: Any, pieces: Any) -> Any:
            out = original(window, pieces)
            out[out == BYTE_VOCABULARY - 1] = NO_TARGET
            return out

        return targets

    return changed(batches, "_targets", make)


@contextmanager
def mean_of_means() -> Iterator[None]:
    """Every micro-batch or rank divides by its own targets."""
    pieces = 1

    def counting(original: Call) -> Call:
        def accumulate(self: Stepper, micro_batches: Sequence[Batch], whole: Any) -> Any:
            nonlocal pieces
            pieces = len(micro_batches)
            return original(self, micro_batches, whole)

        return accumulate

    def dividing(original: Call) -> Call:
        def loss(self: NextToken, output: object, micro: Batch, units: Tensor) -> Any:
            return original(self, output, micro, self.units(micro) * pieces)

        return loss

    with changed(Stepper, "_accumulate", counting), changed(NextToken, "loss", dividing):
        yield


def cold_learning() -> AbstractContextManager[None]:
    """Answers are sampled at a temperature, and training ignores it."""

    def make(original: Call) -> Call:
        def log_probs(
            model: Any, hidden: Tensor, targets: Tensor, chunk: Any = None, temperature: float = 1
        ) -> Any:
            return original(model, hidden, targets, chunk)

        return log_probs

    return changed_everywhere(target_log_probs, make)


def shifted_answers() -> AbstractContextManager[None]:
    """The probability of a token is taken from the position before."""

    def make(original: Call) -> Call:
        def log_probs(model: Any, hidden: Tensor, targets: Tensor, *more: Any, **named: Any) -> Any:
            return original(model, hidden.roll(1, dims=1), targets, *more, **named)

        return log_probs

    return changed_everywhere(target_log_probs, make)


def lost_data_state() -> AbstractContextManager[None]:
    """A resumed run starts at the beginning of its data."""
    return lost(Batches, "load_state")


def lost_optimizer_state() -> AbstractContextManager[None]:
    """A resumed run starts with empty moments."""
    return lost(Optimizers, "load_state_tensors")


def restarted_average() -> AbstractContextManager[None]:
    """A resumed run restarts the moving average of its weights."""

    def make(original: Call) -> Call:
        def load(self: Ema, tensors: Any) -> None:
            original(self, tensors)
            for name, weight in self._weights.items():
                self._averages[name].copy_(weight.detach())

        return load

    return changed(Ema, "load_state_tensors", make)


def lost_random_state() -> AbstractContextManager[None]:
    """A resumed run draws other random numbers."""
    return changed(torch, "set_rng_state", lambda original: lambda state: None)
