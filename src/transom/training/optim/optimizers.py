"""AdamW and Muon over the named parameters of a model, one learning rate per group, state by
name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError, require
from transom.config.model_args import ModelArgs
from transom.training.config import OptimizerArgs
from transom.training.optim.adamw8bit import SMALLEST_QUANTIZED, AdamW8bit
from transom.training.optim.muon import Muon

# Where AdamW has a fused kernel that is faster than one operation over lists of tensors.
FUSED_DEVICES = ("cpu", "cuda")


def width_multiplier(args: ModelArgs) -> float:
    """Return dim / mup_base_dim, by which muP scales, or 1 for a model without muP.

    With muP (Yang et al. 2022, arXiv 2203.03466) rates found on a narrow model fit a wide one, if
    the widths of all parts grow in proportion and heads grow in number. With the multiplier m:

    - AdamW trains block matrices and routers at lr / m, while weight decay times rate stays, as in
      the authors' `mup` package. Embeddings, vectors and the output keep lr.
    - Logits are divided by m (`ModelArgs.logit_factor`). This is table 8 of the paper, where
      embedding and output have equal initialisation and rate, so that they may be tied.
    - Attention keeps 1 / sqrt(head_dim), because head_dim does not change.
    - `LLM.init_weights` fits as it is: its variance is 1 / fan-in up to a constant.
    - Muon needs nothing: the spectral norm of its update is lr * sqrt(max(1, out / in)), which muP
      asks for up to a constant (Yang et al. 2023, arXiv 2310.17813).
    """
    return 1.0 if args.mup_base_dim is None else args.dim / args.mup_base_dim


def parameter_groups(
    model: nn.Module, args: OptimizerArgs, *, width: float = 1.0
) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group for torch optimizers; a tied weight counts
    once.

    A group has `name`, `params`, `param_names`, `kind` ("muon" or "adamw"), `weight_decay`, `lr`
    and `base_lr` (the peak, from which each step sets `lr`); groups without parameters are left
    out. `width` is muP's (`mup.width_multiplier`): AdamW moves block matrices and routers that many
    times less, as their sums have that many times more terms, and decays them as much as ever.
    """
    rates = {
        "matrices": args.muon_lr if args.name == "muon" else args.lr,
        "routers": args.lr,
        "embedding": args.embedding_lr or args.lr,
        "output": args.output_lr or args.lr,
        "vectors": args.norm_lr or args.lr,
        "others": args.lr,
    }
    groups: dict[str, dict[str, Any]] = {}
    for name, rate in rates.items():
        kind = "muon" if args.name == "muon" and name == "matrices" else "adamw"
        scale = width if name in ("matrices", "routers") and kind == "adamw" else 1.0
        groups[name] = {
            "name": name,
            "params": [],
            "param_names": [],
            "kind": kind,
            "weight_decay": 0.0 if name == "vectors" else args.weight_decay * scale,
            "lr": rate / scale,
            "base_lr": rate / scale,
        }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[_group_of(name, parameter)]
            group["params"].append(parameter)
            group["param_names"].append(name)
    return [group for group in groups.values() if group["params"]]


def _group_of(name: str, parameter: Tensor) -> str:
    if (
        ".lora." in name
    ):  # a factor of a sum is no map between features: orthogonalising it fits nothing
        return "others" if parameter.ndim >= 2 else "vectors"
    if name == "tok_embeddings.weight":
        return "embedding"
    if name == "output.weight":
        return "output"
    if parameter.ndim < 2 or name.endswith(".bias"):  # experts stack theirs: [E, out]
        return "vectors"
    # The rows of a router are scores, not a map between features: orthogonalising them fits
    # nothing.
    if name.endswith(".feed_forward.router.weight"):
        return "routers"
    return "matrices" if name.startswith("layers.") and parameter.ndim in (2, 3) else "others"


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

    def clip(self, parameters: Sequence[Tensor], limit: float | None) -> Tensor:
        """Scale the gradients of `parameters` down to a global norm of `limit`; the norm before
        that.
        """
        return torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)

    def set_scale(self, scale: float) -> None:
        """Set every learning rate to `scale` times its peak."""
        for group in self._groups():
            group["lr"] = group["base_lr"] * scale

    def learning_rates(self) -> dict[str, float]:
        """The present learning rate of each group, by group name."""
        return {group["name"]: group["lr"] for group in self._groups()}

    def state_tensors(self) -> dict[str, Tensor]:
        """The live state, such as `layers.0.attention.wq.weight/exp_avg`; the next step changes
        it.
        """
        tensors: dict[str, Tensor] = {}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    for key, value in optimizer.state[parameter].items():
                        tensors[f"{name}/{key}"] = value
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a saved state in; a key too few or too many or another shape or dtype is a
        `RequestError`.
        """
        # Copied into the memory that is there, not adopted: tensors of a mapped file may be
        # unaligned, and kernels then round differently, so that a resumed run would drift from the
        # first one.
        own = self.state_tensors()
        for key in own:
            if key not in tensors:
                raise RequestError(f"{key}: the saved optimizer state lacks this tensor")
        for key, saved in tensors.items():
            if key not in own:
                raise RequestError(f"{key}: no trainable parameter has this optimizer state")
            found, wanted = (saved.dtype, *saved.shape), (own[key].dtype, *own[key].shape)
            require(found == wanted, key, found, f"expected {wanted} (dtype and shape)")
        for key, saved in tensors.items():
            own[key].copy_(saved)

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self._optimizers:
            yield from optimizer.param_groups


class BackwardOptimizers(Optimizers):
    """Each parameter moves inside the backward pass, once its gradient is whole, which is freed at
    once.

    No two gradients of a step are ever there together, so nothing can be clipped or accumulated,
    learning rates must be set before the backward pass, and `step` finds nothing left to do (Lv et
    al. 2023, LOMO, arXiv 2306.09782). Loss or gradient that is not finite is known only when
    weights have moved.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """One optimizer per parameter; hooks are set on the parameters until `remove_hooks`."""
        super().__init__(optimizers)
        self._norms: list[Tensor | None] = [None] * len(optimizers)
        self._hooks = []
        for index, optimizer in enumerate(optimizers):
            (parameter,) = optimizer.param_groups[0]["params"]
            hook = functools.partial(self._move, index, optimizer)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def _move(self, index: int, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        assert parameter.grad is not None, "the hook runs when the gradient is there"
        self._norms[index] = torch.linalg.vector_norm(parameter.grad)
        optimizer.step()
        parameter.grad = None

    def clip(self, parameters: Sequence[Tensor], limit: float | None) -> Tensor:
        """The global norm of the gradients that are gone, of all backward passes since the last
        call.
        """
        assert limit is None, "refused by OptimizerArgs.check_in_backward"
        norms = [norm for norm in self._norms if norm is not None]
        self._norms = [None] * len(self._norms)
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def remove_hooks(self) -> None:
        """Let later backward passes leave gradients again."""
        for hook in self._hooks:
            hook.remove()


def build_optimizer(
    model: nn.Module, args: OptimizerArgs, *, device_type: str, width: float = 1.0
) -> Optimizers:
    """AdamW, and Muon for the block matrices if `args` says so; a model with nothing to train is
    refused.

    `width` as in `parameter_groups`. With `in_backward` the result is a `BackwardOptimizers`.
    """
    groups = parameter_groups(model, args, width=width)
    if not groups:
        raise RequestError("model: no parameter requires a gradient, so there is nothing to train")
    if args.state_bits == 8:
        groups = [part for group in groups for part in _split_by_state(group)]
    if args.in_backward:
        return BackwardOptimizers([_optimizer([one], args, device_type) for one in _single(groups)])
    by_kind = (
        [group for group in groups if group["kind"] == kind]
        for kind in ("adamw", "adamw8bit", "muon")
    )
    return Optimizers([_optimizer(alike, args, device_type) for alike in by_kind if alike])


def _split_by_state(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group's part that 8-bit states fit, and the rest."""
    # Rows of rare tokens share blocks with those of frequent ones, whose moments are far larger,
    # and would be rounded away: embeddings keep 32 bits, as in section 2.3 of the paper. Muon has
    # states of its own.
    if group["kind"] == "muon" or group["name"] == "embedding":
        return [group]
    parts = []
    for kind in ("adamw", "adamw8bit"):
        quantized = kind == "adamw8bit"
        pairs = zip(group["params"], group["param_names"], strict=True)
        kept = [(p, name) for p, name in pairs if (p.numel() >= SMALLEST_QUANTIZED) == quantized]
        if kept:
            params, names = (list(column) for column in zip(*kept, strict=True))
            parts.append({**group, "kind": kind, "params": params, "param_names": names})
    return parts


def _single(groups: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One group per parameter."""
    for group in groups:
        for parameter, name in zip(group["params"], group["param_names"], strict=True):
            yield {**group, "params": [parameter], "param_names": [name]}


def _optimizer(
    groups: list[dict[str, Any]], args: OptimizerArgs, device_type: str
) -> torch.optim.Optimizer:
    """The optimizer of groups of one kind, the state of each parameter made."""
    kind = groups[0]["kind"]
    if kind == "muon":
        return Muon(groups, momentum=args.muon_momentum, steps=args.muon_steps)
    if kind == "adamw8bit":
        return AdamW8bit(groups, lr=args.lr, betas=args.betas, eps=args.eps)
    kernel = {"fused": True} if device_type in FUSED_DEVICES else {"foreach": True}
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=args.betas, eps=args.eps, **kernel)
    _make_adamw_state(adamw)
    return adamw


def _make_adamw_state(adamw: torch.optim.AdamW) -> None:
    # torch makes this state at the first gradient, so a parameter without one yet would be missing
    # from a checkpoint; made here, the keys depend on the model alone. The numbers are the same.
    for group in adamw.param_groups:
        step_device = None if group["fused"] else "cpu"
        for parameter in group["params"]:
            adamw.state[parameter] = {
                "step": torch.zeros(
                    (), dtype=torch.float32, device=step_device or parameter.device
                ),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
