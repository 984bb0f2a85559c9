"""Parameters as DTensors, and modules that compute with this rank's parts of them.

A parameter is a DTensor while no module runs: FSDP, optimizers and checkpoints know its full shape.
While its module runs, an attribute of the same name shows this rank's part as a plain tensor, so
that no code of the model knows of ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def divide_parameters(
    module: nn.Module, mesh: DeviceMesh, place: Callable[[str, Tensor], Placement]
) -> None:
    """Replace the parameters of a module and its children by DTensors, which take their part.

    Args:
        module: The module, possibly on the meta device.
        mesh: A mesh of one dimension.
        place: How a parameter is placed, by its name and itself.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # leaves of one adapter may share a factor
    for path, owner in module.named_modules():
        for key, parameter in list(owner.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                continue
            if parameter not in made:
                places = [place(f"{path}.{key}", parameter)]
                part = distribute_tensor(parameter.detach(), mesh, places, src_data_rank=None)
                # A copy, since a part may be a view that keeps the full tensor in memory.
                made[parameter] = nn.Parameter(part.clone(), parameter.requires_grad)
            owner.register_parameter(key, made[parameter])


PartsShown = Callable[[], contextlib.AbstractContextManager[None]]


def show_parts(module: nn.Module, part: Callable[[str, DTensor], Tensor]) -> PartsShown:
    """Show the parts of all parameters of a module and its children while the module runs.

    Args:
        module: A module whose parameters are DTensors.
        part: The part of a parameter, by its name and itself.

    Returns:
        A context that shows them too, for code that uses the parameters without a call.
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

    @contextlib.contextmanager
    def shown() -> Iterator[None]:
        show()
        try:
            yield
        finally:
            hide()

    module.register_forward_pre_hook(show)
    module.register_forward_hook(hide, always_call=True)
    return shown


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, which shares its memory, or another tensor itself."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a DTensor with all its parts on every rank, or another tensor itself.

    All ranks must call it.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    # In the order in which FSDP and tensor parallelism have divided, and one mesh dimension at a
    # time: torch warns if one call has to gather twice.
    places = list(tensor.placements)
    for dim in range(len(places)):
        places[dim] = Replicate()
        tensor = tensor.redistribute(placements=places)
    return tensor.to_local()


@torch.no_grad()
def copy_full(weight: Tensor, full: Tensor) -> None:
    """Copy a full tensor, or this rank's part of it, into a weight. No other part is read."""
    if isinstance(weight, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(
            weight.shape, weight.device_mesh, weight.placements
        )
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            full = full.narrow(dim, offset, size)
        weight = weight.to_local()
    weight.copy_(full)
