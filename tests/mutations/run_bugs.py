"""Silent bugs in stores, data and training; `bugs.py` names each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.mutations.planting import Call, changed, changed_everywhere, lost
from transom.attention.view import CacheView
from transom.cache.store import LayerCache, RotatingBufferCache, StaticCache
from transom.data import batches
from transom.data.batch import NO_TARGET, Batch
from transom.data.order import Batches
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.loop.trainer import Trainer
from transom.training.losses.log_probs import target_log_probs
from transom.training.losses.objectives import NextToken
from transom.training.optim.ema import Ema
from transom.training.optim.optimizers import Optimizers
from transom.verify.tiny_runs import BYTE_VOCABULARY

# -- stores


def stale_slot() -> AbstractContextManager[None]:
    """A slot keeps the token of the round before under a new position."""

    def make(original: Call) -> Call:
        def write(
            self: LayerCache, states: tuple[Tensor, ...], positions: Tensor, keep: Tensor
        ) -> None:
            before = [x[:, 0].clone() for x in self.states]
            used = bool((self.positions_BS[:, 0] >= 0).any())
            original(self, states, positions, keep)
            if used:  # its position is noted, what stands there is the token of the round before
                for x, old in zip(self.states, before, strict=True):
                    x[:, 0] = old

        return write

    return changed(LayerCache, "_write", make)


def overwriting_prefill() -> AbstractContextManager[None]:
    """A chunk longer than the slack is written before it is read."""

    def make(original: Call) -> Call:
        def update(
            self: LayerCache, states: tuple[Tensor, ...], positions: Tensor, fresh: bool
        ) -> CacheView:
            if fresh:
                return original(self, states, positions, fresh)
            self._write(states, positions, positions >= 0)
            return CacheView(tuple(x[:, :-1] for x in self.states), self.positions_BS[:, :-1])

        return update

    return changed(RotatingBufferCache, "_update", make)


def short_view() -> AbstractContextManager[None]:
    """The last slot of a bucket is not shown."""

    def make(original: Call) -> Call:
        def update(
            self: LayerCache, states: tuple[Tensor, ...], positions: Tensor, fresh: bool
        ) -> CacheView:
            view = original(self, states, positions, fresh)
            shown = view.positions_BS.size(1) - (0 if fresh else 1)
            return replace(
                view,
                states=tuple(x[:, :shown] for x in view.states),
                positions_BS=view.positions_BS[:, :shown],
            )

        return update

    return changed(StaticCache, "_update", make)


# -- data and training


def double_bos() -> AbstractContextManager[None]:
    """The tokenizer frames a document that is framed again."""

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
        def accumulate(self: Trainer, micro_batches: Sequence[Batch], whole: Any) -> Any:
            nonlocal pieces
            pieces = len(micro_batches)
            return original(self, micro_batches, whole)

        return accumulate

    def dividing(original: Call) -> Call:
        def loss(self: NextToken, output: object, micro: Batch, units: Tensor) -> Any:
            return original(self, output, micro, self.units(micro) * pieces)

        return loss

    with changed(Trainer, "_accumulate", counting), changed(NextToken, "loss", dividing):
        yield


def cold_learning() -> AbstractContextManager[None]:
    """Answers are drawn at a temperature and learnt from as if there were none."""

    def make(original: Call) -> Call:
        def log_probs(
            model: Any, hidden: Tensor, targets: Tensor, chunk: Any = None, temperature: float = 1
        ) -> Any:
            return original(model, hidden, targets, chunk)

        return log_probs

    return changed_everywhere(target_log_probs, make)


def shifted_answers() -> AbstractContextManager[None]:
    """A token's probability is read one position early."""

    def make(original: Call) -> Call:
        def log_probs(model: Any, hidden: Tensor, targets: Tensor, *more: Any, **named: Any) -> Any:
            return original(model, hidden.roll(1, dims=1), targets, *more, **named)

        return log_probs

    return changed_everywhere(target_log_probs, make)


def lost_data_state() -> AbstractContextManager[None]:
    """A resumed run begins its data anew."""
    return lost(Batches, "load_state")


def lost_optimizer_state() -> AbstractContextManager[None]:
    """A resumed run begins with empty moments."""
    return lost(Optimizers, "load_state_tensors")


def restarted_average() -> AbstractContextManager[None]:
    """A resumed run begins its moving average of the weights anew."""

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
