"""The modules of a block as the structures that C++ reads."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transom.config.layer_args import LayerArgs
from transom.layers.attention import Attention
from transom.layers.block import TransformerBlock
from transom.layers.feed_forward import FeedForward
from transom.layers.linear import Embedding, GroupedLinear, Linear
from transom.layers.moe import Experts, LocalDispatcher, MoE, Router
from transom.layers.norm import LayerNorm, RMSNorm
from transom.ops import block as ops
from transom.ops.weights import DENSE, Weight, coded_weight, dense_weight
from transom.quantize.leaves import (
    Quantized,
    QuantizedEmbedding,
    QuantizedGroupedLinear,
    QuantizedLinear,
)


class NotCovered(Exception):
    """C++ doesn't cover a part of a block; the message says which."""


class Watch:
    """What can change a call of the modules of a plan, while its weights stay where they are."""

    def __init__(self) -> None:
        self._hooks = RemovableHandle.next_id
        self._copied: list[tuple[Tensor, int]] = []
        # C++ has their addresses, and the model may get other tensors between two calls.
        self._kept: list[Tensor] = []

    def module(self, module: nn.Module, *kinds: type) -> None:
        """Check that a call of the module runs the forward of its class, and nothing else. Its own
        parameters stay in memory as long as this object.

        Raises:
            NotCovered: It is not of these kinds, or it has hooks or another forward.
        """
        if type(module) not in kinds:
            raise NotCovered(f"a module is {type(module).__name__}")
        replaced = "forward" in vars(module) or module._compiled_call_impl is not None
        if module._forward_hooks or module._forward_pre_hooks or replaced:
            raise NotCovered("a module has hooks, an adapter or another forward")
        tensors = [x.detach() for x in module._parameters.values() if x is not None]
        if not all(type(x) is Tensor and x.is_contiguous() for x in tensors):
            raise NotCovered("a weight is not one dense tensor")
        self._kept += tensors

    def copied(self, tensor: Tensor | None) -> None:
        """Watch the numbers of a tensor of which C++ reads a copy in float32.

        Tensors that were made under inference mode do not count what is written into them.
        """
        if tensor is not None and not (tensor.dtype is torch.float32 or tensor.is_inference()):
            self._copied.append((tensor, tensor._version))

    def same(self) -> bool:
        """Return whether no hook was added since, and no copied number has changed.

        Adapters are hooks. The parameters themselves are not compared: to look at each of them
        costs 5% of a token, since they are not in the cache of the CPU.
        """
        no_hooks = self._hooks == RemovableHandle.next_id
        return no_hooks and all(one._version == version for one, version in self._copied)


class NativeBlock(NamedTuple):
    """One block for C++, and the objects that its structures point to."""

    args: ops.BlockArgs
    layer: LayerArgs
    kept: list[object]


def native_block(block: nn.Module, watch: Watch) -> NativeBlock:
    """Translate one block.

    Raises:
        NotCovered: It has an option that C++ doesn't cover.
    """
    kept: list[object] = []
    if any(one.is_meta for one in block.parameters()):
        raise NotCovered("their weights are streamed")
    watch.module(block, TransformerBlock)
    assert isinstance(block, TransformerBlock), "as watched"
    layer, attention, ffn = block.layer, block.attention, block.feed_forward
    if block.cross_attention is not None:
        raise NotCovered("attention to a context")
    if layer.mla is not None:
        raise NotCovered("latent attention")
    watch.module(attention, Attention)
    assert isinstance(attention, Attention), "as watched"
    args = ops.BlockArgs(
        **{name: norm_of(getattr(block, name), watch) for name in _NORMS},
        q_norm=norm_of(attention.q_norm, watch),
        k_norm=norm_of(attention.k_norm, watch),
        **{name: _kept(getattr(attention, name), watch, kept) for name in ("wq", "wk", "wv", "wo")},
        sinks=_numbers(attention.sinks),
        dim=layer.dim,
        heads=layer.n_heads,
        kv_heads=layer.n_kv_heads,
        head_dim=layer.head_dim,
        norm_heads=layer.qk_norm == "head",
        norm_rotated=layer.use_qk_norm,
        halves=layer.rope is not None and layer.rope.layout == "halves",
        scale=layer.head_dim**-0.5 if layer.softmax_scale is None else layer.softmax_scale,
        softcap=layer.attn_softcap or 0.0,
        norm_eps=layer.norm_eps,
    )
    if (args.wq.outputs, args.wk.outputs) != (
        args.heads * args.head_dim,
        args.kv_heads * args.head_dim,
    ):
        raise NotCovered("a share of the heads")
    if isinstance(ffn, MoE):
        experts = _experts(ffn, watch, kept)
        kept.append(experts)
        args.experts = ctypes.addressof(experts)
    else:
        args.feed_forward = _feed_forward(ffn, watch, kept)
    return NativeBlock(args, layer, kept)


_NORMS = ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm")


def weight_of(leaf: nn.Module, watch: Watch, expert: int | None = None) -> Weight:
    """Return the weight of a leaf, or of one expert of it.

    Raises:
        NotCovered: The leaf is of another kind, or C++ doesn't cover its format.
    """
    bias: Tensor | None = leaf._parameters.get("bias")
    if not expert:
        watch.module(leaf, *_LEAVES)
        watch.copied(bias)
    if expert is not None and bias is not None:
        bias = bias[expert]
    if isinstance(leaf, Quantized):
        parts, form = leaf.parts, leaf.format
        if expert is not None:
            parts = {name: part[expert] for name, part in parts.items()}
        made = coded_weight(parts, form.levels, form.scales, form.block, bias, leaf.weight_dtype)
    else:
        weight: Tensor = leaf.weight  # type: ignore[assignment]  # of a leaf
        made = dense_weight(weight if expert is None else weight[expert], bias)
    if made is None:
        raise NotCovered("the format of a weight")
    return made


_LEAVES = (
    Linear,
    Embedding,
    GroupedLinear,
    QuantizedLinear,
    QuantizedEmbedding,
    QuantizedGroupedLinear,
)


def _kept(leaf: nn.Module, watch: Watch, kept: list[object], expert: int | None = None) -> Weight:
    weight = weight_of(leaf, watch, expert)
    kept.append(weight)
    return weight


def _numbers(tensor: Tensor | None) -> ops.Numbers:
    if tensor is not None and tensor.dtype not in DENSE:
        raise NotCovered("the dtype of a weight")
    return ops.Numbers.of(tensor)


def norm_of(norm: nn.Module | None, watch: Watch) -> ops.NormArgs:
    """Return a norm, or none.

    Raises:
        NotCovered: It is of another kind.
    """
    if norm is None:
        return ops.NormArgs()
    watch.module(norm, RMSNorm, LayerNorm)
    assert isinstance(norm, RMSNorm | LayerNorm), "as watched"
    kind = norm.kind if isinstance(norm, RMSNorm) else "layer"
    bias = norm.bias if isinstance(norm, LayerNorm) else None
    return ops.NormArgs(ops.NORMS[kind], _numbers(norm.weight), _numbers(bias), norm.eps)


def _feed_forward(ffn: nn.Module, watch: Watch, kept: list[object]) -> ops.FeedForwardArgs:
    watch.module(ffn, FeedForward)
    assert isinstance(ffn, FeedForward), "as watched"
    args = ops.FeedForwardArgs(
        value=_kept(ffn.w_value, watch, kept),
        out=_kept(ffn.w_out, watch, kept),
        activation=ops.ACTIVATIONS[ffn.activation],
    )
    args.hidden = args.value.outputs
    if ffn.w_gate is not None:
        args.gate, args.gated = _kept(ffn.w_gate, watch, kept), True
    return args


def _experts(moe: MoE, watch: Watch, kept: list[object]) -> ops.ExpertsArgs:
    options, router, experts = moe.moe, moe.router, moe.experts
    watch.module(moe, MoE)
    watch.module(router, Router)
    watch.module(experts, Experts)
    if type(moe.dispatcher) is not LocalDispatcher:
        raise NotCovered("experts on several processes")
    watch.copied(router.bias)
    scores = dense_weight(router.weight, router.bias)
    if scores is None:
        raise NotCovered("the dtype of a weight")
    activation = experts.layer.activation
    clamped = options.expert_activation == "clamped"
    native = (ops.FeedForwardArgs * options.num_experts)()
    for index in range(options.num_experts):
        one = native[index]
        one.value = _kept(experts.w_value, watch, kept, index)
        one.out = _kept(experts.w_out, watch, kept, index)
        one.hidden = one.value.outputs
        one.activation = ops.ACTIVATIONS[activation]
        if experts.w_gate is not None:
            one.gate, one.gated = _kept(experts.w_gate, watch, kept, index), True
            one.activation = ops.ACTIVATIONS["clamped" if clamped else activation]
            one.limit = options.activation_limit
    args = ops.ExpertsArgs(
        router=scores,
        choice_bias=_numbers(router.choice_bias),
        experts=ctypes.addressof(native),
        count=options.num_experts,
        active=options.top_k,
        routing=ops.ROUTINGS[options.routing],
        normalize=options.normalize,
        groups=options.num_groups,
        active_groups=options.top_groups,
        scale=options.routed_scale,
    )
    kept += [scores, native]
    if moe.shared_expert is not None:
        shared = _feed_forward(moe.shared_expert, watch, kept)
        kept.append(shared)
        args.shared = ctypes.addressof(shared)
    return args
