"""An exponential moving average of the weights: what is scored, sampled and saved, while training
goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError, require

RAW = "raw/"  # before the names of trained weights among the tensors of a trainer


def ema_decay(step: int, decay: float) -> float:
    """The share of the average that `step`, counted from 0, keeps: min(decay, (1 + step) / (10 +
    step)).

    The warm-up of TensorFlow's ExponentialMovingAverage: an average of few steps forgets the first
    weights fast.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """The moving average of every trainable weight of `model`, by name, in the weights' own dtype.

    A step folder's `model.safetensors` holds the averages and its `trainer.safetensors` the trained
    weights: whoever loads the folder gets what was scored, and only a resumed run needs the rest.
    Frozen weights and what is moved from outside, such as the choice biases of experts, are used as
    they stand.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Starts at the present weights, which must be float32 or wider: a narrower average would
        stand still.
        """
        require(0 < decay < 1, "ema_decay", decay, "expected a number above 0 and below 1, or null")
        self.decay = decay
        self._weights = {
            name: weight for name, weight in model.named_parameters() if weight.requires_grad
        }
        for name, weight in self._weights.items():
            wide = torch.promote_types(weight.dtype, torch.float32) == weight.dtype
            require(
                wide,
                f"dtype of {name}",
                str(weight.dtype),
                "an average accepts float32 or wider weights",
            )
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._raw: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 0."""
        assert self._raw is None, "inside swapped() the model holds the averages"
        share = 1 - ema_decay(step, self.decay)
        weights = [weight.detach() for weight in self._weights.values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, share)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds the averages inside and exactly its own weights again behind; takes one
        more copy.
        """
        # Values move, tensors stay: optimizers, hooks and compiled graphs hold on to the
        # parameters.
        assert self._raw is None, "swapped() does not nest"
        self._raw = {name: weight.detach().clone() for name, weight in self._weights.items()}
        try:
            self._fill(self._averages)
            yield
        finally:
            self._fill(self._raw)
            self._raw = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The trained weights as `raw/NAME`, inside `swapped()` or not; the averages are the saved
        model's.
        """
        held = self._raw if self._raw is not None else self._weights
        return {f"{RAW}{name}": weight.detach() for name, weight in held.items()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: MutableMapping[str, Tensor]) -> None:
        """Take the averages from the model, which a step folder has filled, and the weights out of
        `tensors`.
        """
        saved = {
            key.removeprefix(RAW): tensors.pop(key) for key in list(tensors) if key.startswith(RAW)
        }
        if saved.keys() != self._weights.keys():
            odd = sorted(saved.keys() ^ self._weights.keys())[0]
            raise RequestError(
                f"{RAW}{odd}: the saved weights and the trainable weights of the model differ in it"
            )
        for name, weight in self._weights.items():
            found, wanted = (saved[name].dtype, *saved[name].shape), (weight.dtype, *weight.shape)
            require(found == wanted, f"{RAW}{name}", found, f"expected {wanted} (dtype and shape)")
        for name, weight in self._weights.items():
            self._averages[name].copy_(weight)
        self._fill(saved)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])
