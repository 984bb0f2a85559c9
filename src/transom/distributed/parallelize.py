"""What divides a built model over ranks, from outside and in one order."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils import _pytree

from transom.base.errors import notice
from transom.base.runtime import give_back_freed_memory
from transom.distributed.expert_parallel import divide_experts
from transom.distributed.mesh import Meshes
from transom.distributed.pipeline import divide_layers
from transom.distributed.tensor_parallel import divide_tensors
from transom.layers.inputs import TransformerOutput
from transom.layers.moe import MoE, RouterStatistics
from transom.lora.adapters import adapted_modules
from transom.models.llm import LLM


def parallelize(model: LLM, meshes: Meshes) -> LLM:
    """Divide a model over the ranks of `meshes`.

    The names of its parameters stay. Parameters that are divided become DTensors, and the gradient
    of each is the sum over all ranks that computed a part of it. A model that is only replicated
    is not changed, and its gradients are summed by `Ranks.sum_gradients`.

    Args:
        model: The model with its adapters and quantized leaves, possibly on the meta device. All
            ranks have the same one. It is changed in place.
        meshes: The ranks.

    Returns:
        The same model.

    Raises:
        RequestError: If the model, an adapter or a quantized leaf cannot be divided. The model is
            unchanged.
    """
    args = meshes.args
    args.check_model(model.args)
    for _, _, adapters in adapted_modules(model) if args.divides_model else ():
        adapters.drop_replaced()  # no module has them, so nothing would divide them
    # 1. Layers: the rest divides those of this rank's stage.
    if args.pipeline > 1:
        divide_layers(model, meshes.groups["pipeline"])
    # 2. Tensors and experts: what FSDP divides is this rank's part of them.
    if args.tensor > 1:
        divide_tensors(model, meshes.dense["tensor"])
    if meshes.experts is not None:
        divide_experts(model, meshes.experts["expert"])
    # 3. FSDP2 last, block by block. (Activation checkpointing and compile replace the `forward` of
    #    a block, inside of the hooks of FSDP2.)
    if args.divides_model and meshes.size("tokens") > 1:
        _shard(model, meshes)
    return model


def _shard(model: LLM, meshes: Meshes) -> None:
    """Divide weights, gradients and optimizer state over the ranks with different tokens."""
    if meshes.device_type == "cpu":
        give_back_freed_memory()
    # FSDP2 looks for tensors in inputs and outputs, and pytrees do not know dataclasses.
    for kind in (TransformerOutput, RouterStatistics):
        if kind not in _pytree.SUPPORTED_NODES:
            _pytree.register_dataclass(kind)
    for module in model.modules():
        if isinstance(module, MoE) and meshes.experts is not None:
            _fully_shard(module.experts, meshes.expert_fsdp)
    for block in model.layers:
        _fully_shard(block, meshes.fsdp)
    _fully_shard(model, meshes.fsdp)


def _fully_shard(module: nn.Module, mesh: DeviceMesh) -> None:
    ranks, copied = mesh.size(mesh.ndim - 1), set[nn.Parameter]()
    if torch.__version__ < "2.12":  # FSDP2 makes parameters that require gradients of them
        copied = {one for one in module.parameters() if not one.is_floating_point()}
    fully_shard(
        module,
        mesh=mesh,
        shard_placement_fn=lambda weight: _sharded_dim(weight, ranks),
        ignored_params=copied,
    )
    if copied:
        notice(f"torch {torch.__version__}: codes of quantized weights are not divided over ranks")
    assert isinstance(module, FSDPModule), "its class since the line before"
    # Losses are sums that are divided by the targets of the step over all ranks.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _sharded_dim(weight: Tensor, ranks: int) -> Shard | None:
    """Return the dimension that FSDP2 divides; None is the first.

    Stacked experts are often fewer than the ranks, and then some ranks would have all of them.
    """
    taken = set()
    if isinstance(weight, DTensor):
        taken = {place.dim for place in weight.placements if isinstance(place, Shard)}
        weight = weight.to_local()
    if weight.ndim < 2 or weight.size(0) % ranks == 0:
        return None
    fitting = (dim for dim in range(1, weight.ndim) if weight.size(dim) % ranks == 0)
    found = next((dim for dim in fitting if dim not in taken), None)
    return None if found is None or weight.size(0) >= ranks else Shard(found)
