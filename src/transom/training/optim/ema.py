"""An exponential moving average of the weights, which is scored, sampled and saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError, expect
from transom.distributed.parts import local_part
from transom.training.optim.optimizers import require_alike

RAW = "raw/"  # prefix of the trained weights among the trainer's tensors


def ema_decay(step: int, decay: float) -> float:
    """Return the share of the average that `step`, counted from 0, keeps.

    This is min(decay, (1 + step) / (10 + step)), the warm-up of TensorFlow's
    ExponentialMovingAverage: an average of few steps forgets the first weights fast.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """The moving average of every trainable weight of a model, in the weights' own dtype.

    A step folder's model.safetensors has the averages, and its trainer.safetensors the trained
    weights. A user who loads the folder gets the scored weights, and a resumed run continues with
    the others.
    Frozen weights, and those that are changed otherwise, such as the choice biases of experts, have
    no average.

    Raises:
        RequestError: If `decay` is not between 0 and 1, or a weight is narrower than float32, in
            which an average would not move.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        expect(0 < decay < 1, "ema_decay", decay, "a number above 0 and below 1, or null")
        self.decay = decay
        named = model.named_parameters()
        self._weights = {name: weight for name, weight in named if weight.requires_grad}
        for name, weight in self._weights.items():
            wide = torch.promote_types(weight.dtype, torch.float32) == weight.dtype
            expect(wide, f"dtype of {name}", str(weight.dtype), "float32 or wider")
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._raw: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after optimizer step `step`, counted from 0, to the average."""
        assert self._raw is None, "inside swapped() the model has the averages"
        share = 1 - ema_decay(step, self.decay)
        averages = [local_part(average) for average in self._averages.values()]
        weights = [local_part(weight) for weight in self._weights.values()]
        torch._foreach_lerp_(averages, weights, share)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the model have the averages inside the block, and exactly its own weights after it.

        This takes the memory of one more copy. Values are copied and no tensor is replaced, because
        optimizers, hooks and compiled graphs refer to the parameters.
        """
        assert self._raw is None, "swapped() does not nest"
        self._raw = {name: weight.detach().clone() for name, weight in self._weights.items()}
        try:
            self._fill(self._averages)
            yield
        finally:
            self._fill(self._raw)
            self._raw = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the trained weights as `raw/NAME`, also inside `swapped()`."""
        trained = self._raw if self._raw is not None else self._weights
        return {f"{RAW}{name}": weight.detach() for name, weight in trained.items()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: MutableMapping[str, Tensor]) -> None:
        """Take the averages from the model, which has been loaded, and the weights from `tensors`.

        Raises:
            RequestError: If the saved weights differ from those of the model in name, dtype or
                shape. The model is then unchanged.
        """
        names = [key for key in tensors if key.startswith(RAW)]
        saved = {name.removeprefix(RAW): tensors.pop(name) for name in names}
        if odd := sorted(saved.keys() ^ self._weights.keys()):
            raise RequestError(f"{RAW}{odd[0]}: saved or trainable, but not both")
        for name, weight in self._weights.items():
            require_alike(f"{RAW}{name}", saved[name], weight)
        for name, weight in self._weights.items():
            local_part(self._averages[name]).copy_(local_part(weight))
        self._fill(saved)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            local_part(weight).copy_(local_part(values[name]))
