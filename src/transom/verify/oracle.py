"""The forward pass once more, written from the formulas: one sequence, token by token, head by
head, float64.

It shares no code with the model but the arguments as a person writes them and the names of the
weights, so a mistake in one of the two shows as a difference. It is slow, and meant to be read
beside the papers: RoPE (arXiv 2104.09864), GQA (2305.13245), RMSNorm (1910.07467), SwiGLU
(2002.05202), Mixtral (2401.04088).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.errors import RequestError
from transom.config.layer_args import MoeArgs
from transom.config.model_args import ModelArgs
from transom.verify.oracle_rope import rotated


def lacks(args: ModelArgs) -> list[str]:
    """The options of a model that this page does not speak, by field."""
    scaling = args.rope_scaling
    unknown = scaling is not None and scaling.by_length
    missing = {
        "context_dim": args.context_dim is not None,
        "vision_args": args.vision_args is not None,
        "head": args.head is not None,
        "mup_base_dim": args.mup_base_dim is not None,
        f"rope_scaling.kind = {scaling.kind if scaling else None}": unknown,
    }
    return [name for name, there in missing.items() if there]


class Oracle:
    """Logits of one sequence from `weights` by name (float64; gradients flow into them)."""

    def __init__(self, args: ModelArgs, weights: Mapping[str, Tensor]) -> None:
        if missing := lacks(args):
            raise RequestError(
                f"{', '.join(missing)}: the oracle has no formula for it; compare with another "
                f"check"
            )
        self.args, self.weights = args, weights
        self.heads, self.kv_heads = args.n_heads, args.n_kv_heads or args.n_heads
        mla = args.mla_args
        self.head_dim = (
            mla.qk_nope_head_dim + mla.qk_rope_head_dim
            if mla
            else args.head_dim or args.dim // args.n_heads
        )

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """[T, V] for the tokens at positions 0 .. T - 1."""
        args = self.args
        embedding = self.weights["tok_embeddings.weight"]
        stream = [embedding[token] * (args.embedding_scale or 1.0) for token in tokens]
        for index in range(args.n_layers):
            stream = self.block(index, stream)
        output = embedding if args.tie_embeddings else self.weights["output.weight"]
        rows = [output @ self.norm("norm", x) * (args.logit_scale or 1.0) for x in stream]
        return torch.stack([capped(row, args.logit_softcap) for row in rows])

    def block(self, index: int, stream: list[Tensor]) -> list[Tensor]:
        """x + attention(norm(x)), then x + feed_forward(norm(x)), with norms before, behind or on
        both sides.
        """
        before, behind = self.args.norm_placement != "post", self.args.norm_placement != "pre"
        at = f"layers.{index}."
        normed = [self.norm(f"{at}attention_norm", x) if before else x for x in stream]
        added = self.attention(index, normed)
        added = [self.norm(f"{at}attention_post_norm", y) if behind else y for y in added]
        stream = [x + y for x, y in zip(stream, added, strict=True)]
        normed = [self.norm(f"{at}ffn_norm", x) if before else x for x in stream]
        added = [self.feed_forward(index, x) for x in normed]
        added = [self.norm(f"{at}ffn_post_norm", y) if behind else y for y in added]
        return [x + y for x, y in zip(stream, added, strict=True)]

    # -- norms and linears
    # ----------------------------------------------------------------------------

    def norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * w, with 1 + w for Gemma; LayerNorm also takes the mean off,
        adds a bias.
        """
        weight, eps = self.weights[f"{name}.weight"], eps or self.args.norm_eps
        if self.args.norm == "layer":
            return unit(x - x.mean(), eps) * weight + self.weights[f"{name}.bias"]
        return unit(x, eps) * (1.0 + weight if self.args.norm == "rms_plus_one" else weight)

    def linear(self, name: str, x: Tensor, bias: bool = False) -> Tensor:
        """W x, plus b where the option says that there is one."""
        y = self.weights[f"{name}.weight"] @ x
        return y + self.weights[f"{name}.bias"] if bias else y

    # -- attention
    # ------------------------------------------------------------------------------------

    def letter(self, index: int) -> str:
        """What kind of layer this is: F, S, C or B, small when it has no positions."""
        args = self.args
        if args.layer_pattern is not None:
            return args.layer_pattern[index % len(args.layer_pattern)]
        if args.nope_layer_interval and (index + 1) % args.nope_layer_interval == 0:
            return "f"
        return "S" if args.sliding_window else "C" if args.attention_chunk_size else "F"

    def sees(self, letter: str, query: int, key: int) -> bool:
        """Whether the token at `query` may look at the token at `key`."""
        args, kind = self.args, letter.upper()
        if kind == "B":
            return True
        near = query - key < (args.sliding_window or 0)  # the window counts the token itself
        together = query // (args.attention_chunk_size or 1) == key // (
            args.attention_chunk_size or 1
        )
        return key <= query and (near if kind == "S" else together if kind == "C" else True)

    def attention(self, index: int, xs: list[Tensor]) -> list[Tensor]:
        """softmax(q k / sqrt(H)) v over the keys that may be seen; query head h reads kv head h //
        (N / K).
        """
        args, letter, at = self.args, self.letter(index), f"layers.{index}.attention."
        make = self.heads_of if args.mla_args is None else self.latent_heads_of
        queries, keys, values = zip(
            *(make(at, letter, t, x) for t, x in enumerate(xs)), strict=True
        )
        scale = args.softmax_scale or self.head_dim**-0.5
        out = []
        for position in range(len(xs)):
            seen = [other for other in range(len(xs)) if self.sees(letter, position, other)]
            heads = []
            for head in range(self.heads):
                kv = head // (self.heads // self.kv_heads)
                scores = (
                    torch.stack([queries[position][head] @ keys[other][kv] for other in seen])
                    * scale
                )
                scores = capped(scores, args.attn_softcap)
                if args.attn_sinks:  # takes its share of the softmax and has no value
                    scores = torch.cat((scores, self.weights[f"{at}sinks"][head : head + 1]))
                shares = scores.softmax(0)
                heads.append(
                    sum_of(
                        share * values[other][kv]
                        for share, other in zip(shares, seen, strict=False)
                    )
                )
            out.append(self.linear(f"{at}wo", torch.cat(heads), args.out_bias))
        return out

    def heads_of(self, at: str, letter: str, position: int, x: Tensor) -> tuple[list[Tensor], ...]:
        """(queries, keys, values) of one token, head by head."""
        q, k, v = (self.linear(f"{at}{name}", x, self.args.qkv_bias) for name in ("wq", "wk", "wv"))
        if self.args.qk_norm == "projection":
            q, k = self.norm(f"{at}q_norm", q), self.norm(f"{at}k_norm", k)
        queries = [self.place(at, "q", letter, position, head) for head in q.split(self.head_dim)]
        return (
            queries,
            [self.place(at, "k", letter, position, head) for head in k.split(self.head_dim)],
            [*v.split(self.head_dim)],
        )

    def latent_heads_of(
        self, at: str, letter: str, position: int, x: Tensor
    ) -> tuple[list[Tensor], ...]:
        """The same by way of the latents of DeepSeek (arXiv 2405.04434): heads are [not rotated |
        rotated].
        """
        mla, bias = self.args.mla_args, self.args.qkv_bias
        assert mla is not None, "asked of such a model only"
        if mla.q_lora_rank is None:
            q = self.linear(f"{at}wq", x)
        else:
            narrow = self.norm(f"{at}q_a_norm", self.linear(f"{at}wq_a", x, bias), mla.norm_eps)
            q = self.linear(f"{at}wq_b", narrow)
        sizes = (mla.qk_nope_head_dim, mla.qk_rope_head_dim)
        queries = [head.split(sizes) for head in q.split(sum(sizes))]
        tuned = self.temperature(letter, position)
        latent, shared = self.linear(f"{at}wkv_a", x, bias).split((mla.kv_lora_rank, sizes[1]))
        up = self.linear(f"{at}wkv_b", self.norm(f"{at}kv_a_norm", latent, mla.norm_eps)).split(
            sizes[0] + mla.v_head_dim
        )
        if letter.isupper():
            shared = rotated(shared, position, self.args)
            queries = [(plain, rotated(turning, position, self.args)) for plain, turning in queries]
        keys = [torch.cat((head[: sizes[0]], shared)) for head in up]
        return (
            [torch.cat(parts) * tuned for parts in queries],
            keys,
            [head[sizes[0] :] for head in up],
        )

    def temperature(self, letter: str, position: int) -> float:
        """What queries of layers without positions are multiplied by, far into a text."""
        args = self.args
        if letter.isupper() or not args.attn_temperature_tuning:
            return 1.0
        return 1 + args.attn_scale * math.log(1 + math.floor((position + 1) / args.floor_scale))

    def place(self, at: str, kind: str, letter: str, position: int, head: Tensor) -> Tensor:
        """One head of a query or key: learned norm, rotation, weightless norm, temperature, in this
        order.
        """
        args = self.args
        if args.qk_norm == "head":
            head = self.norm(f"{at}{kind}_norm", head)
        if letter.isupper():
            local = letter in "SC" and args.rope_local_theta is not None
            head = rotated(head, position, args, local)
            return unit(head, args.norm_eps) if args.use_qk_norm else head
        return head * self.temperature(letter, position) if kind == "q" else head

    # -- feed-forward
    # ---------------------------------------------------------------------------------

    def feed_forward(self, index: int, x: Tensor) -> Tensor:
        """w_out(act(w_gate x) * w_value x), or a mixture of such."""
        at, moe = f"layers.{index}.feed_forward.", self.args.moe_args
        dense = moe is None or index < moe.first_dense_layers or index in moe.dense_layers
        if moe is None or dense or (index + 1) % moe.interleave_moe_layer_step:
            return self.swiglu(at, x, self.args.ffn_bias)
        logits = self.linear(f"{at}router", x, moe.router_bias)
        scores = logits.softmax(0) if moe.routing == "softmax" else logits.sigmoid()
        best = self.chosen(
            moe, scores + self.weights[f"{at}router.choice_bias"] if moe.has_choice_bias else logits
        )
        total = sum_of(scores[expert] for expert in best) if moe.normalize else 1.0
        added = []
        for expert in best:
            if moe.routing == "sigmoid":  # scales what goes in, and no weight sums to one
                added.append(self.expert(at, expert, x * scores[expert]))
            else:
                scale = moe.routed_scale if moe.routing == "biased_sigmoid" else 1.0
                added.append(scale * scores[expert] / total * self.expert(at, expert, x))
        if moe.shared_expert:
            added.append(self.swiglu(f"{at}shared_expert.", x, self.args.ffn_bias))
        return sum_of(added)

    def chosen(self, moe: MoeArgs, choice: Tensor) -> list[int]:
        """The best experts, out of the groups whose two best add up highest."""
        groups = choice.chunk(moe.num_groups)
        if moe.num_groups > 1:
            kept = (
                torch.stack([group.topk(2).values.sum() for group in groups])
                .topk(moe.top_groups)
                .indices.tolist()
            )
            groups = tuple(
                group if i in kept else group - math.inf for i, group in enumerate(groups)
            )
        return torch.cat(groups).argsort(descending=True)[: moe.top_k].tolist()

    def swiglu(self, at: str, x: Tensor, bias: bool) -> Tensor:
        """The dense feed-forward, gated or not."""
        value = self.linear(f"{at}w_value", x, bias)
        hidden = (
            self.act(self.linear(f"{at}w_gate", x, bias)) * value
            if self.args.ffn_gated
            else self.act(value)
        )
        return self.linear(f"{at}w_out", hidden, bias)

    def expert(self, at: str, expert: int, x: Tensor) -> Tensor:
        """One of the experts, whose matrices lie in one tensor [E, out, in]."""
        moe = self.args.moe_args
        assert moe is not None, "asked of a mixture only"

        def linear(name: str, x: Tensor) -> Tensor:
            y = self.weights[f"{at}experts.{name}.weight"][expert] @ x
            return y + self.weights[f"{at}experts.{name}.bias"][expert] if moe.expert_bias else y

        value = linear("w_value", x)
        if not self.args.ffn_gated:
            return linear("w_out", self.act(value))
        gate = linear("w_gate", x)
        if moe.expert_activation == "model":
            return linear("w_out", self.act(gate) * value)
        limit = moe.activation_limit  # gpt-oss
        gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
        return linear("w_out", (value + 1) * gate * torch.sigmoid(1.702 * gate))

    def act(self, x: Tensor) -> Tensor:
        """silu x sigmoid(x), gelu x Phi(x) or its tanh approximation, relu max(x, 0)."""
        match self.args.activation:
            case "silu":
                return x * x.sigmoid()
            case "gelu":
                return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
            case "gelu_tanh":
                return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
            case "relu":
                return F.relu(x)


def unit(x: Tensor, eps: float) -> Tensor:
    """x divided by its root mean square."""
    return x / torch.sqrt(x.square().mean() + eps)


def capped(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap), or x."""
    return x if cap is None else cap * torch.tanh(x / cap)


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """The sum of one tensor or more."""
    first, *rest = parts
    return sum(rest, first)
