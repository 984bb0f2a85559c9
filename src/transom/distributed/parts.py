"""Parameters as DTensors, and modules that compute with this rank's parts of them.

A parameter is a DTensor while no module runs: FSDP, optimizers and checkpoints know its full shape.
While its module runs, an attribute of the same name shows this rank's part as a plain tensor, so
that no code of the model knows of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor


def divide_parameters(
    module: nn.Module, mesh: DeviceMesh, place: Callable[[str, Tensor], Placement]
) -> None:
    """Replace the parameters of a module and its children by DTensors, which take their part.

    Args:
        module: The module, possibly on the meta device.
        mesh: A mesh of one dimension.
        place: How a parameter is placed, by its name and itself.
    """
    for path, owner in module.named_modules():
        for key, parameter in list(owner.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                continue
            placement = place(f"{path}.{key}", parameter)
            made = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
            owner.register_parameter(key, nn.Parameter(made, parameter.requires_grad))


def show_parts(module: nn.Module, part: Callable[[str, DTensor], Tensor]) -> None:
    """Show the parts of all parameters of a module and its children while the module runs.

    Args:
        module: A module whose parameters are DTensors.
        part: The part of a parameter, by its name and itself.
    """
    owned = [
        (owner, key, f"{path}.{key}")
        for path, owner in module.named_modules()
        for key, parameter in owner._parameters.items()
        if parameter is not None
    ]

    def show(*_: Any) -> None:
        for owner, key, name in owned:
            parameter = owner._parameters[key]  # FSDP replaces it
            assert isinstance(parameter, DTensor), "divided before, and gathered by FSDP"
            vars(owner)[key] = part(name, parameter)

    def hide(*_: Any) -> None:
        for owner, key, _name in owned:
            vars(owner).pop(key, None)

    module.register_forward_pre_hook(show)
    module.register_forward_hook(hide, always_call=True)


@torch.no_grad()
def copy_full(weight: Tensor, full: Tensor) -> None:
    """Copy a full tensor, or this rank's part of it, into a weight."""
    if isinstance(weight, DTensor):
        full = full.to(weight.device)
        full = distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.copy_(full)
