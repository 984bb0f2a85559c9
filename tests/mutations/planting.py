"""Context managers that replace a function of Transom and restore it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from transom.attention.mask import MaskSpec
from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerArgs
from transom.config.model_args import ModelArgs
from transom.layers.attention import Attention
from transom.layers.step import Step

Call = Callable[..., Any]


@contextlib.contextmanager
def changed(owner: object, name: str, make: Callable[[Call], Any]) -> Iterator[None]:
    """Replace `owner.name` by what `make` returns for the original."""
    original = vars(owner)[name]
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def changed_everywhere(function: Call, make: Callable[[Call], Call]) -> Iterator[None]:
    """Replace a function in every module of Transom that has imported it by name."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("transom") and vars(module).get(function.__name__) is function:
                stack.enter_context(changed(module, function.__name__, make))
        yield


def around_attend(make: Callable[[Attention, Call], Call]) -> AbstractContextManager[None]:
    """Make every self-attention layer call what `make(layer, attend)` returns."""

    def outer(forward: Call) -> Call:
        def wrapped(self: Attention, x: Tensor, step: Step, cache: object = None) -> Tensor:
            return forward(self, x, replace(step, attend=make(self, step.attend)), cache)

        return wrapped

    return changed(Attention, "forward", outer)


def scored(**lost: None) -> AbstractContextManager[None]:
    """Leave out parts of the attention scores."""

    def make(layer: Attention, attend: Call) -> Call:
        def call(q: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
            return attend(q, view, spec, replace(score, **lost))

        return call

    return around_attend(make)


def layered(**fields: Any) -> AbstractContextManager[None]:
    """Replace fields of all layers; a function gets (model arguments, layer) and returns the
    value.
    """

    def make(original: Call) -> Call:
        def layer(self: ModelArgs, index: int, letter: str) -> LayerArgs:
            told = original(self, index, letter)
            return replace(
                told,
                **{
                    key: value(self, told) if callable(value) else value
                    for key, value in fields.items()
                },
            )

        return layer

    return changed(ModelArgs, "_layer", make)


def lost(owner: object, name: str) -> AbstractContextManager[None]:
    """Replace a method by one that does nothing."""
    return changed(owner, name, lambda original: lambda self, *given: None)
