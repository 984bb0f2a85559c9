"""A hook that lets `load_state_dict` accept the names that weights have in Meta's and Mistral's
code (`tables.py`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from transom.base.errors import RequestError, explained
from transom.config.model_args import ModelArgs
from transom.names.tables import IGNORED_ENDINGS, REFERENCE_NAMES, expand
from transom.names.transforms import apply_transform


def load_hook(
    args: ModelArgs, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Pre-hook for `load_state_dict` that renames foreign keys in place. Bind `args` with
    `functools.partial`.

    Raises:
        RequestError: a weight is there under both names, or a foreign tensor has the wrong shape.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for key in [key for key in state if key.endswith(IGNORED_ENDINGS)]:
        del state[key]
    for mapping in expand(REFERENCE_NAMES, args, shapes):
        foreign, ours = ([prefix + n for n in names] for names in (mapping.foreign, mapping.ours))
        if not all(name in state for name in foreign):
            continue  # `load_state_dict` reports whatever is missing
        for name in ours:
            if name in state:
                found = f"{foreign[0]} and {name}, the same weights"
                raise RequestError(f"state dict: got {found}; expected one of them")
        given, wanted = [state.pop(name) for name in foreign], [shapes[n] for n in mapping.ours]
        found = f"{foreign[0]}: got shape {tuple(given[0].shape)}"
        with explained(f"{found}; expected one that makes {wanted}", RuntimeError):
            made = apply_transform(mapping.transform, given, wanted)
        state.update(zip(ours, made, strict=True))
