"""The forward pass of the model a second time, from the formulas, in loops over tokens and heads.

It uses the arguments as a user writes them and the names of the weights, and shares no code with
the model, so that a mistake in one of the two changes the result. It is slow. The papers are: RoPE
(arXiv 2104.09864), RMSNorm (1910.07467), SwiGLU (2002.05202), GQA (2305.13245), Mixtral
(2401.04088), DeepSeek-V2 (2405.04434).
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
from transom.verify.oracle_rope import rotate

Heads = list[Tensor]  # the vectors of one token, head by head


def unsupported(args: ModelArgs) -> list[str]:
    """Return the fields of options that the oracle does not implement."""
    fields = ("context_dim", "vision_args", "head", "mup_base_dim")
    missing = [name for name in fields if getattr(args, name) is not None]
    scaling = args.rope_scaling
    if scaling is not None and scaling.by_length:
        missing.append(f"rope_scaling.kind = {scaling.kind}")
    return missing


class Oracle:
    """Computes the logits of one sequence.

    Args:
        args: The arguments of the model.
        weights: The weights by the names of the model's parameters, float64. Gradients flow into
            them.

    Raises:
        RequestError: If the model uses an option that is not implemented here.
    """

    def __init__(self, args: ModelArgs, weights: Mapping[str, Tensor]) -> None:
        if missing := unsupported(args):
            raise RequestError(f"{', '.join(missing)}: the oracle has no formula for it")
        self.args, self.weights = args, weights
        self.heads, self.kv_heads = args.n_heads, args.n_kv_heads or args.n_heads
        self.head_dim = args.head_dim or args.dim // args.n_heads
        if args.mla_args is not None:
            self.head_dim = args.mla_args.qk_nope_head_dim + args.mla_args.qk_rope_head_dim

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits [T, V] of the tokens at positions 0 to T - 1."""
        args = self.args
        embedding = self.weights["tok_embeddings.weight"]
        stream = [embedding[token] * (args.embedding_scale or 1.0) for token in tokens]
        for index in range(args.n_layers):
            stream = self.block(index, stream)
        output = embedding if args.tie_embeddings else self.weights["output.weight"]
        rows = [output @ self.norm("norm", x) * (args.logit_scale or 1.0) for x in stream]
        return torch.stack([softcap(row, args.logit_softcap) for row in rows])

    def block(self, index: int, stream: list[Tensor]) -> list[Tensor]:
        """Return x + attention(norm(x)), then x + feed_forward(norm(x)), for every token.

        The norms come before a sublayer, after it, or both.
        """
        at = f"layers.{index}."
        pre, post = self.args.norm_placement != "post", self.args.norm_placement != "pre"
        normed = [self.norm(f"{at}attention_norm", x) if pre else x for x in stream]
        added = self.attention(index, normed)
        added = [self.norm(f"{at}attention_post_norm", y) if post else y for y in added]
        stream = [x + y for x, y in zip(stream, added, strict=True)]
        normed = [self.norm(f"{at}ffn_norm", x) if pre else x for x in stream]
        added = [self.feed_forward(index, x) for x in normed]
        added = [self.norm(f"{at}ffn_post_norm", y) if post else y for y in added]
        return [x + y for x, y in zip(stream, added, strict=True)]

    # -- norms and linear maps

    def norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        """Return x / sqrt(mean(x^2) + eps) * w; Gemma has 1 + w, LayerNorm subtracts the mean."""
        weight, eps = self.weights[f"{name}.weight"], eps or self.args.norm_eps
        if self.args.norm == "layer":
            return rms_normalize(x - x.mean(), eps) * weight + self.weights[f"{name}.bias"]
        factor = 1.0 + weight if self.args.norm == "rms_plus_one" else weight
        return rms_normalize(x, eps) * factor

    def linear(self, name: str, x: Tensor, bias: bool = False, expert: int | None = None) -> Tensor:
        """Return W x, or W x + b if the option of the bias is on.

        The matrices of all experts are one tensor [E, out, in].
        """
        weight, b = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"] if bias else None
        y = (weight if expert is None else weight[expert]) @ x
        return y if b is None else y + (b if expert is None else b[expert])

    # -- attention

    def letter(self, index: int) -> str:
        """Return the kind of a layer: F, S, C or B, in lower case for a layer without RoPE."""
        args = self.args
        if args.layer_pattern is not None:
            return args.layer_pattern[index % len(args.layer_pattern)]
        if args.nope_layer_interval and (index + 1) % args.nope_layer_interval == 0:
            return "f"
        if args.sliding_window:
            return "S"
        return "C" if args.attention_chunk_size else "F"

    def may_attend(self, letter: str, query: int, key: int) -> bool:
        """Return whether the token at position `query` may attend to the one at `key`."""
        window, chunk = self.args.sliding_window or 0, self.args.attention_chunk_size or 1
        match letter.upper():
            case "B":
                return True
            case "S":
                return key <= query < key + window  # the window includes the token itself
            case "C":
                return key <= query and query // chunk == key // chunk
        return key <= query

    def attention(self, index: int, xs: list[Tensor]) -> list[Tensor]:
        """Return softmax(q k / sqrt(H)) v for every token.

        Query head h reads key/value head h // (N / K).
        """
        args, letter, at = self.args, self.letter(index), f"layers.{index}.attention."
        project = self.project if args.mla_args is None else self.project_latent
        tokens = [project(at, letter, position, x) for position, x in enumerate(xs)]
        scale = args.softmax_scale or self.head_dim**-0.5
        outputs = []
        for position, (queries, _, _) in enumerate(tokens):
            seen = [one for t, one in enumerate(tokens) if self.may_attend(letter, position, t)]
            heads = []
            for head, query in enumerate(queries):
                kv = head // (self.heads // self.kv_heads)
                scores = torch.stack([query @ keys[kv] for _, keys, _ in seen]) * scale
                scores = softcap(scores, args.attn_softcap)
                if args.attn_sinks:  # a sink takes part in the softmax and has no value
                    scores = torch.cat((scores, self.weights[f"{at}sinks"][head : head + 1]))
                shares = scores.softmax(0)
                values = [values[kv] for _, _, values in seen]
                heads.append(total(p * v for p, v in zip(shares, values, strict=False)))
            outputs.append(self.linear(f"{at}wo", torch.cat(heads), args.out_bias))
        return outputs

    def project(self, at: str, letter: str, position: int, x: Tensor) -> tuple[Heads, Heads, Heads]:
        """Return the queries, keys and values of one token."""
        q, k, v = (self.linear(f"{at}{name}", x, self.args.qkv_bias) for name in ("wq", "wk", "wv"))
        if self.args.qk_norm == "projection":
            q, k = self.norm(f"{at}q_norm", q), self.norm(f"{at}k_norm", k)
        size = self.head_dim
        queries = [self.embed_position(f"{at}q_norm", letter, position, h) for h in q.split(size)]
        keys = [self.embed_position(f"{at}k_norm", letter, position, h) for h in k.split(size)]
        if letter.islower():
            queries = [self.temperature(letter, position) * head for head in queries]
        return queries, keys, [*v.split(size)]

    def embed_position(self, norm: str, letter: str, position: int, head: Tensor) -> Tensor:
        """Apply the learned norm, RoPE, and the norm without weights to a head of q or k."""
        args = self.args
        if args.qk_norm == "head":
            head = self.norm(norm, head)
        if letter.islower():
            return head
        local = letter in "SC" and args.rope_local_theta is not None
        head = rotate(head, position, args, local)
        return rms_normalize(head, args.norm_eps) if args.use_qk_norm else head

    def project_latent(
        self, at: str, letter: str, position: int, x: Tensor
    ) -> tuple[Heads, Heads, Heads]:
        """Return the same by DeepSeek's latents; a head is [without RoPE | with RoPE]."""
        mla, bias = self.args.mla_args, self.args.qkv_bias
        assert mla is not None, "only called for such models"
        if mla.q_lora_rank is None:
            q = self.linear(f"{at}wq", x)
        else:
            narrow = self.norm(f"{at}q_a_norm", self.linear(f"{at}wq_a", x, bias), mla.norm_eps)
            q = self.linear(f"{at}wq_b", narrow)
        nope, rope = mla.qk_nope_head_dim, mla.qk_rope_head_dim
        queries = [head.split((nope, rope)) for head in q.split(nope + rope)]
        latent, shared = self.linear(f"{at}wkv_a", x, bias).split((mla.kv_lora_rank, rope))
        wide = self.linear(f"{at}wkv_b", self.norm(f"{at}kv_a_norm", latent, mla.norm_eps))
        if letter.isupper():
            shared = rotate(shared, position, self.args)
            queries = [(one, rotate(other, position, self.args)) for one, other in queries]
        up = wide.split(nope + mla.v_head_dim)
        keys = [torch.cat((head[:nope], shared)) for head in up]
        factor = self.temperature(letter, position)
        return [torch.cat(parts) * factor for parts in queries], keys, [head[nope:] for head in up]

    def temperature(self, letter: str, position: int) -> float:
        """Return the factor of queries in layers without RoPE; it grows with the position."""
        args = self.args
        if letter.isupper() or not args.attn_temperature_tuning:
            return 1.0
        return 1 + args.attn_scale * math.log(1 + math.floor((position + 1) / args.floor_scale))

    # -- feed-forward

    def feed_forward(self, index: int, x: Tensor) -> Tensor:
        """Return the feed-forward of one token, dense or a mixture of experts."""
        at, moe = f"layers.{index}.feed_forward.", self.args.moe_args
        dense = moe is None or index < moe.first_dense_layers or index in moe.dense_layers
        if moe is None or dense or (index + 1) % moe.interleave_moe_layer_step:
            return self.dense(at, x, self.args.ffn_bias)
        logits = self.linear(f"{at}router", x, moe.router_bias)
        scores = logits.softmax(0) if moe.routing == "softmax" else logits.sigmoid()
        choice = scores + self.weights[f"{at}router.choice_bias"] if moe.has_choice_bias else logits
        chosen = self.choose(moe, choice)
        divisor = total(scores[expert] for expert in chosen) if moe.normalize else 1.0
        scale = moe.routed_scale if moe.routing == "biased_sigmoid" else 1.0
        clamped = moe.expert_activation != "model"
        outputs = []
        for expert in chosen:
            # Llama 4 scales the input of the experts.
            before = scores[expert] if moe.routing == "sigmoid" else 1.0
            after = 1.0 if moe.routing == "sigmoid" else scale * scores[expert] / divisor
            y = self.dense(f"{at}experts.", x * before, moe.expert_bias, expert, clamped)
            outputs.append(after * y)
        if moe.shared_expert:
            outputs.append(self.dense(f"{at}shared_expert.", x, self.args.ffn_bias))
        return total(outputs)

    def choose(self, moe: MoeArgs, choice: Tensor) -> list[int]:
        """Return the best experts, from the groups with the largest sum of their two best."""
        groups = choice.chunk(moe.num_groups)
        if moe.num_groups > 1:
            best = torch.stack([group.topk(2).values.sum() for group in groups])
            kept = best.topk(moe.top_groups).indices.tolist()
            groups = tuple(
                group if i in kept else group - math.inf for i, group in enumerate(groups)
            )
        return torch.cat(groups).argsort(descending=True)[: moe.top_k].tolist()

    def dense(
        self, at: str, x: Tensor, bias: bool, expert: int | None = None, clamped: bool = False
    ) -> Tensor:
        """Return w_out(act(w_gate x) * w_value x), w_out(act(w_value x)) without a gate, or that of
        gpt-oss with clamped values.
        """
        value = self.linear(f"{at}w_value", x, bias, expert)
        if not self.args.ffn_gated:
            return self.linear(f"{at}w_out", self.act(value), bias, expert)
        gate = self.linear(f"{at}w_gate", x, bias, expert)
        if clamped and self.args.moe_args is not None:
            limit = self.args.moe_args.activation_limit
            gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
            gated = (value + 1) * gate * torch.sigmoid(1.702 * gate)
        else:
            gated = self.act(gate) * value
        return self.linear(f"{at}w_out", gated, bias, expert)

    def act(self, x: Tensor) -> Tensor:
        """Return x sigmoid(x), x Phi(x), its tanh approximation, or max(x, 0)."""
        match self.args.activation:
            case "silu":
                return x * x.sigmoid()
            case "gelu":
                return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
            case "gelu_tanh":
                inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
                return 0.5 * x * (1 + torch.tanh(inner))
            case "relu":
                return F.relu(x)


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """Return x divided by its root mean square."""
    return x / torch.sqrt(x.square().mean() + eps)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(x / cap), or x without a cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def total(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of one or more tensors."""
    first, *rest = parts
    return sum(rest, first)
