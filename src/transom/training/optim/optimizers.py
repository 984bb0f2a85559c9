"""AdamW and Muon over the named parameters of a model, with one learning rate per group."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from transom.base.errors import RequestError, expect
from transom.config.model_args import ModelArgs
from transom.training.optim.adamw8bit import AdamW8bit, can_quantize
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.muon import Muon

KINDS = ("adamw", "adamw8bit", "muon")
# Devices on which AdamW has a fused kernel that is faster than operations over lists of tensors.
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
    """Return the trainable parameters in groups for torch optimizers; a tied weight counts once.

    Args:
        model: The model.
        args: The settings of the optimizer.
        width: muP's multiplier, see `width_multiplier`. AdamW trains block matrices and routers at
            a rate that is so many times lower, because their sums have so many times more terms;
            their decay stays.

    Returns:
        Groups with `name`, `params`, `param_names`, `kind` (`muon`, `adamw` or `adamw8bit`),
        `weight_decay`, `lr` and `base_lr`, the peak from which `Optimizers.set_scale` sets `lr`.
        Groups without parameters are left out. Parameters on different meshes of ranks, such as
        experts on theirs, are in different groups, because no operation takes both.
    """
    rates = {
        "matrices": args.muon_lr if args.name == "muon" else args.lr,
        "routers": args.lr,
        "embedding": args.embedding_lr or args.lr,
        "output": args.output_lr or args.lr,
        "vectors": args.norm_lr or args.lr,
        "others": args.lr,
    }
    groups: dict[tuple[str, str, Any], dict[str, Any]] = {}
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = _group_of(path, parameter)
        kind = _kind_of(name, parameter, args)
        scale = width if name in ("matrices", "routers") and kind != "muon" else 1.0
        new: dict[str, Any] = {
            "name": name,
            "params": [],
            "param_names": [],
            "kind": kind,
            "weight_decay": 0.0 if name == "vectors" else args.weight_decay * scale,
            "lr": rates[name] / scale,
            "base_lr": rates[name] / scale,
        }
        group = groups.setdefault((name, kind, _mesh(parameter)), new)
        group["params"].append(parameter)
        group["param_names"].append(path)
    order = [(name, kind) for name in rates for kind in KINDS]
    return [groups[key] for key in sorted(groups, key=lambda key: order.index(key[:2]))]


def _mesh(parameter: Tensor) -> DeviceMesh | None:
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def _group_of(path: str, parameter: Tensor) -> str:
    # Muon orthogonalises maps between features. The factors of an adapter and the rows of a router
    # are none, and it would not fit them.
    if ".lora." in path:
        return "others" if parameter.ndim >= 2 else "vectors"
    if path == "tok_embeddings.weight":
        return "embedding"
    if path == "output.weight":
        return "output"
    if parameter.ndim < 2 or path.endswith(".bias"):  # experts stack theirs: [E, out]
        return "vectors"
    if path.endswith(".feed_forward.router.weight"):
        return "routers"
    return "matrices" if path.startswith("layers.") and parameter.ndim in (2, 3) else "others"


def _kind_of(group: str, parameter: Tensor, args: OptimizerArgs) -> str:
    if args.name == "muon" and group == "matrices":
        return "muon"
    # Embeddings keep 32 bits, as in section 2.3 of the paper.
    small = args.state_bits == 8 and group not in ("embedding", "vectors")
    return "adamw8bit" if small and can_quantize(parameter) else "adamw"


class Optimizers:
    """The optimizers of one model with a common step, and their state as tensors by name.

    Attributes:
        all: The optimizers.
        paused: Whether backward passes only leave gradients, also with `BackwardOptimizers`.
    """

    paused = False

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Take optimizers of `parameter_groups`, with the state of each parameter."""
        self.all = tuple(optimizers)

    def step(self) -> None:
        """Update the parameters that have gradients, at the present learning rates."""
        for optimizer in self.all:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop (or zero) the gradients of all parameters."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=set_to_none)

    def clip(self, parameters: Sequence[Tensor], limit: float | None) -> Tensor:
        """Clip the gradients of `parameters` to a global norm; return the norm before that."""
        return torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)

    def set_scale(self, scale: float) -> None:
        """Set every learning rate to `scale` times its peak."""
        for group in self._groups():
            group["lr"] = group["base_lr"] * scale

    def learning_rates(self) -> dict[str, float]:
        """Return the present learning rate of each group by its name."""
        return {group["name"]: group["lr"] for group in self._groups()}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state, such as `layers.0.attention.wq.weight/exp_avg`; a step changes it."""
        return {
            f"{name}/{key}": value
            for optimizer in self.all
            for group in optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            for key, value in optimizer.state[parameter].items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a saved state into the optimizers.

        Raises:
            RequestError: If a key is missing or unknown, or a tensor has another shape or dtype.
        """
        own = self.state_tensors()
        for key in own:
            if key not in tensors:
                raise RequestError(f"{key}: the saved optimizer state lacks this tensor")
        for key, saved in tensors.items():
            if key not in own:
                raise RequestError(f"{key}: no trainable parameter has this optimizer state")
            require_alike(key, saved, own[key])
        # Tensors of a mapped file may be unaligned, and kernels then round differently: a resumed
        # run would drift. So they are copied into the memory of the optimizers.
        for key, saved in tensors.items():
            own[key].copy_(saved)

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self.all:
            yield from optimizer.param_groups


def require_alike(name: str, saved: Tensor, own: Tensor) -> None:
    """Refuse a saved tensor of another dtype or shape than one's own."""
    found, wanted = (saved.dtype, *saved.shape), (own.dtype, *own.shape)
    expect(found == wanted, name, found, f"{wanted} (dtype and shape)")


class BackwardOptimizers(Optimizers):
    """Updates each parameter inside the backward pass, and frees its gradient at once.

    No two gradients of a step are in memory together (Lv et al. 2023, LOMO, arXiv 2306.09782), so
    nothing can be clipped or accumulated. Learning rates must be set before the backward pass, and
    `step` has nothing left to do. A loss or gradient that is not finite is found only after weights
    have changed.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Take one optimizer per parameter."""
        super().__init__(optimizers)
        self._norms: list[Tensor] = []
        for optimizer in optimizers:
            (parameter,) = optimizer.param_groups[0]["params"]
            hook = functools.partial(self._move, optimizer)
            parameter.register_post_accumulate_grad_hook(hook)

    def _move(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        if self.paused:
            return
        assert parameter.grad is not None, "the hook runs when the gradient is complete"
        self._norms.append(torch.linalg.vector_norm(parameter.grad))
        optimizer.step()
        parameter.grad = None

    def clip(self, parameters: Sequence[Tensor], limit: float | None) -> Tensor:
        """Return the global norm of the gradients of all backward passes since the last call."""
        assert limit is None, "refused by OptimizerArgs.check_in_backward"
        norms = self._norms
        self._norms = []
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def build_optimizer(
    model: nn.Module,
    args: OptimizerArgs,
    *,
    device_type: str,
    width: float = 1.0,
    group: ProcessGroup | None = None,
) -> Optimizers:
    """Return AdamW, and Muon for the matrices of blocks if `args` says so.

    Args:
        model: The model.
        args: The settings. With `in_backward` the result is a `BackwardOptimizers`.
        device_type: Type of the model's device, such as `cuda`.
        width: muP's multiplier, see `parameter_groups`.
        group: The ranks that have the parts of divided parameters, see `Muon`.

    Raises:
        RequestError: If no parameter is trainable, or ranks cut blocks of 8-bit states.
    """
    groups = parameter_groups(model, args, width=width)
    if not groups:
        raise RequestError("model: no parameter requires a gradient, so there is nothing to train")
    if args.in_backward:
        single = (
            {**group, "params": [parameter], "param_names": [name]}
            for group in groups
            for parameter, name in zip(group["params"], group["param_names"], strict=True)
        )
        return BackwardOptimizers([_optimizer([one], args, device_type) for one in single])
    # One mesh per optimizer: unscaling float16 gradients looks at all parameters of one together.
    by_kind: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for one in sorted(groups, key=lambda one: KINDS.index(one["kind"])):
        by_kind.setdefault((one["kind"], _mesh(one["params"][0])), []).append(one)
    return Optimizers([_optimizer(alike, args, device_type, group) for alike in by_kind.values()])


def _optimizer(
    groups: list[dict[str, Any]],
    args: OptimizerArgs,
    device_type: str,
    group: ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer of groups of one kind, with the state of each parameter."""
    kind = groups[0]["kind"]
    if kind == "muon":
        return Muon(groups, momentum=args.muon_momentum, steps=args.muon_steps, group=group)
    if kind == "adamw8bit":
        return AdamW8bit(groups, lr=args.lr, betas=args.betas, eps=args.eps)
    kernel = {"fused": True} if device_type in FUSED_DEVICES else {"foreach": True}
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=args.betas, eps=args.eps, **kernel)
    # torch makes this state at the first gradient, so that a parameter without one would be missing
    # from a checkpoint. Made here, its keys depend on the model alone; the numbers are the same.
    for one in adamw.param_groups:
        for parameter in one["params"]:
            device = parameter.device if one["fused"] else torch.device("cpu")
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return adamw
