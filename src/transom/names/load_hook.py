"""What lets `load_state_dict` take the names that weights have had in other codes; the names are in
`names.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from transom.base.errors import RequestError
from transom.config.model_args import ModelArgs
from transom.names.tables import IGNORED_ENDINGS, REFERENCE_NAMES, expand
from transom.names.transforms import Shape, to_own


def accept_old_names(
    args: ModelArgs, state: dict[str, Tensor], shapes: Mapping[str, Shape], prefix: str = ""
) -> None:
    """Turn old names in `state` into ours, in place; a key whose new name is there too is a
    `RequestError`.
    """
    for key in [key for key in state if key.endswith(IGNORED_ENDINGS)]:
        del state[key]
    for move in expand(REFERENCE_NAMES, args, shapes):
        old = [prefix + name for name in move.foreign]
        if not all(name in state for name in old):
            continue  # whatever is missing, `load_state_dict` says so
        twice = [prefix + name for name in move.ours if prefix + name in state]
        if twice:
            raise RequestError(
                f"state dict has {old[0]} and {twice[0]}, which are the same weights; expected one"
            )
        try:
            made = to_own(
                move.transform, [state[name] for name in old], [shapes[name] for name in move.ours]
            )
        except RuntimeError:
            found, wanted = tuple(state[old[0]].shape), [shapes[name] for name in move.ours]
            raise RequestError(
                f"{old[0]} has shape {found}: expected what makes {wanted}"
            ) from None
        for name in old:
            del state[name]
        state.update(zip((prefix + name for name in move.ours), made, strict=True))


def load_hook(
    args: ModelArgs, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Of the model that `args` describes, once bound: for
    `Module.register_load_state_dict_pre_hook`.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    accept_old_names(args, state, shapes, prefix)
