"""Divided models of which each rank allocates its parts only, and reads module by module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from transom.base.files import shown_name
from transom.checkpoints.files.lazy_tensors import TensorGroup
from transom.checkpoints.load import count_nonfinite, open_weights, warn_nonfinite
from transom.checkpoints.state import meta_model
from transom.config.model_args import ModelArgs
from transom.distributed.mesh import Meshes
from transom.distributed.parallelize import parallelize
from transom.distributed.parts import copy_full
from transom.lora.adapters import tie_replacements
from transom.models.llm import LLM

Tensors = dict[str, Tensor]
# Returns all parameters of a module from those that files have; see `read_parts`.
MakeModule = Callable[[str, nn.Module, Tensors], Tensors]


def allocate(args: ModelArgs, meshes: Meshes | None, device: torch.device) -> LLM:
    """Return a model with this rank's parts of its weights, which are not filled yet.

    Args:
        args: The model.
        meshes: The ranks; None for one rank, which has everything.
        device: The device of this rank.
    """
    model = meta_model(args)
    if meshes is not None:
        parallelize(model, meshes)
    return model.to_empty(device=device)


def load_parts(
    folder: Path,
    meshes: Meshes,
    device: torch.device,
    dtype: str = "float32",
    *,
    keep_quantized: bool | None = False,
) -> LLM:
    """Return a model with this rank's parts of its weights.

    Args:
        folder: A model folder of any format.
        meshes: The ranks.
        device: The device of this rank.
        dtype: As for `load`.
        keep_quantized: As for `load`.

    Raises:
        RequestError: The files are damaged or do not fit the config, or the model cannot be
            divided.
    """
    model, weights = open_weights(folder, dtype, keep_quantized=keep_quantized)
    read_parts(model, weights, meshes, device, shown_name(folder))
    return model


@torch.no_grad()
def read_parts(
    model: LLM,
    weights: Mapping[str, TensorGroup],
    meshes: Meshes,
    device: torch.device,
    where: str,
    make: MakeModule | None = None,
) -> None:
    """Divide a model, and read this rank's parts of its weights, one module after the other.

    Args:
        model: The model of `open_weights`, which may have got adapters, codes or more rows since.
            It is changed in place.
        weights: Its weights as the files have them, not read yet.
        meshes: The ranks.
        device: The device of this rank.
        where: The folder, for messages.
        make: Called for each module that has weights in the files, in the order of the model,
            with its name, the module and these weights in full and in the dtype of the files. It
            returns the module's parameters in full, with those of its adapters. On ranks without
            the layer, tensors are on the meta device.

    Raises:
        RequestError: If the model cannot be divided, or by `make`.
    """
    every = dict(model.named_modules())
    parallelize(model, meshes).to_empty(device=device)
    tie_replacements(model)
    own, left = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    by_module: dict[str, list[TensorGroup]] = {path: [] for path in every}
    for name, group in weights.items():
        by_module[name.rpartition(".")[0]].append(group)
    counts: dict[str, int] = {}

    def fill(path: str, module: nn.Module) -> None:  # whose tensors are freed when it returns
        full: Tensors = {}
        for group in by_module[path]:
            here = own.get(path) is module  # and not in another stage
            read = group.read() if here else group.metas
            if here and len(read) == 1:  # not codes
                counts[group.keys[0]] = count_nonfinite(read[0])
            full |= zip((key.rpartition(".")[2] for key in group.keys), read, strict=True)
        made = full if make is None else make(path, module, full)
        for name, tensor in made.items():
            weight = left.pop(f"{path}.{name}", None)
            if weight is not None:
                copy_full(weight, tensor)

    for path, module in every.items():
        if by_module[path]:
            fill(path, module)
    assert not left, f"weights of no file: {[*left]}"
    warn_nonfinite(counts, where)
