"""AdamW and Muon over the named parameters of a model, one learning rate per group, state by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import RequestError, require
from transom.training.config import OptimizerArgs
from transom.training.muon import Muon

# Where AdamW has a fused kernel that is faster than one operation over lists of tensors.
FUSED_DEVICES = ("cpu", "cuda")


def parameter_groups(model: nn.Module, args: OptimizerArgs) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group for torch optimizers; a tied weight counts once.

    A group has `name`, `params`, `param_names`, `kind` ("muon" or "adamw"), `weight_decay`, `lr` and
    `base_lr` (the peak, from which each step sets `lr`); groups without parameters are left out.
    """
    rates = {
        "matrices": args.muon_lr if args.name == "muon" else args.lr,
        "embedding": args.embedding_lr or args.lr,
        "output": args.output_lr or args.lr,
        "vectors": args.norm_lr or args.lr,
        "others": args.lr,
    }
    groups: dict[str, dict[str, Any]] = {}
    for name, rate in rates.items():
        groups[name] = {
            "name": name,
            "params": [],
            "param_names": [],
            "kind": "muon" if args.name == "muon" and name == "matrices" else "adamw",
            "weight_decay": 0.0 if name == "vectors" else args.weight_decay,
            "lr": rate,
            "base_lr": rate,
        }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[_group_of(name, parameter)]
            group["params"].append(parameter)
            group["param_names"].append(name)
    return [group for group in groups.values() if group["params"]]


def _group_of(name: str, parameter: Tensor) -> str:
    if name == "tok_embeddings.weight":
        return "embedding"
    if name == "output.weight":
        return "output"
    if parameter.ndim < 2:
        return "vectors"
    # The rows of a router are scores, not a map between features: orthogonalising them fits nothing.
    is_router = name.endswith(".feed_forward.router.weight")
    in_block = name.startswith("layers.") and parameter.ndim in (2, 3)
    return "matrices" if in_block and not is_router else "others"


class Optimizers:
    """The optimizers of one model behind one step, with their state as a flat mapping of names."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Groups must be those of `parameter_groups`, the state of each parameter already made."""
        self._optimizers = optimizers

    @property
    def all(self) -> tuple[torch.optim.Optimizer, ...]:
        """The torch optimizers, for a gradient scaler."""
        return tuple(self._optimizers)

    def step(self) -> None:
        """Apply the gradients that are there, at the learning rates last set."""
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop (or zero) the gradients of all parameters."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def set_scale(self, scale: float) -> None:
        """Set every learning rate to `scale` times its peak."""
        for group in self._groups():
            group["lr"] = group["base_lr"] * scale

    def learning_rates(self) -> dict[str, float]:
        """The present learning rate of each group, by group name."""
        return {group["name"]: group["lr"] for group in self._groups()}

    def state_tensors(self) -> dict[str, Tensor]:
        """The live state, such as `layers.0.attention.wq.weight/exp_avg`; the next step changes it."""
        tensors: dict[str, Tensor] = {}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    for key, value in optimizer.state[parameter].items():
                        tensors[f"{name}/{key}"] = value
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a saved state in; a key too few or too many or another shape or dtype is a `RequestError`."""
        # Copied into the memory that is there, not adopted: tensors of a mapped file may be unaligned,
        # and kernels then round differently, so that a resumed run would drift from the first one.
        own = self.state_tensors()
        for key in own:
            if key not in tensors:
                raise RequestError(f"{key}: the saved optimizer state lacks this tensor")
        for key, saved in tensors.items():
            if key not in own:
                raise RequestError(f"{key}: no trainable parameter has this optimizer state")
            found, wanted = (saved.dtype, *saved.shape), (own[key].dtype, *own[key].shape)
            require(found == wanted, key, found, f"accepted is {wanted} (dtype and shape)")
        for key, saved in tensors.items():
            own[key].copy_(saved)

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self._optimizers:
            yield from optimizer.param_groups


def build_optimizer(model: nn.Module, args: OptimizerArgs, *, device_type: str) -> Optimizers:
    """AdamW, and Muon for the block matrices if `args` says so; a model with nothing to train is refused."""
    groups = parameter_groups(model, args)
    if not groups:
        raise RequestError("model: no parameter requires a gradient, so there is nothing to train")
    optimizers: list[torch.optim.Optimizer] = []
    if adamw_groups := [group for group in groups if group["kind"] == "adamw"]:
        kernel = {"fused": True} if device_type in FUSED_DEVICES else {"foreach": True}
        adamw = torch.optim.AdamW(adamw_groups, lr=args.lr, betas=args.betas, eps=args.eps, **kernel)
        _make_adamw_state(adamw)
        optimizers.append(adamw)
    if muon_groups := [group for group in groups if group["kind"] == "muon"]:
        optimizers.append(Muon(muon_groups, momentum=args.muon_momentum, steps=args.muon_steps))
    return Optimizers(optimizers)


def _make_adamw_state(adamw: torch.optim.AdamW) -> None:
    # torch makes this state at the first gradient, so a parameter without one yet would be missing from
    # a checkpoint; made here, the keys depend on the model alone. The numbers are the same.
    for group in adamw.param_groups:
        step_device = None if group["fused"] else "cpu"
        for parameter in group["params"]:
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=step_device or parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
