"""How the ranks of a run share a model and its batches. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from transom.base.errors import expect
from transom.base.fields import check_bounds, describe
from transom.config.model_args import ModelArgs


@dataclass(frozen=True)
class ParallelArgs:
    """The degree of each kind of parallelism. Their product, without `expert`, is the world size.

    Raises:
        RequestError: If a degree is below 1, or `context_ring` is given without `context`.
    """

    replicate: int = describe(
        1, "copies of the model, each with its own rows (DDP; with shard: hybrid FSDP)", at_least=1
    )
    shard: int | None = describe(
        None,
        "ranks that divide weights, gradients and optimizer state (FSDP2), each with its own rows; "
        "null: all ranks that the other degrees leave",
        at_least=1,
    )
    tensor: int = describe(
        1, "ranks that divide every matrix and the vocabulary, with the same rows", at_least=1
    )
    context: int = describe(1, "ranks that divide the tokens of each row", at_least=1)
    context_ring: bool = describe(
        False, "ring attention in place of gathered keys, for rows of one document"
    )
    expert: int = describe(
        1, "ranks that divide the experts, out of the shard x context ranks", at_least=1
    )
    pipeline: int = describe(
        1, "groups of ranks with consecutive layers; micro-batches run through them", at_least=1
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        fits = self.context > 1 or not self.context_ring
        expect(fits, "context_ring", self.context_ring, "false without context above 1")

    @property
    def rows(self) -> int:
        """Number of groups of ranks that have different rows."""
        return self.replicate * (self.shard or 1)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.rows * self.context * self.tensor * self.pipeline

    @property
    def divides_model(self) -> bool:
        """Whether no rank has all weights."""
        return self.world_size > self.replicate

    def resolved(self, world_size: int) -> ParallelArgs:
        """Return the degrees for a number of ranks, with a number for `shard`.

        Raises:
            RequestError: If the degrees do not multiply out to `world_size`.
        """
        rest = replace(self, shard=1).world_size
        shard = self.shard if self.shard is not None else max(1, world_size // rest)
        found = replace(self, shard=shard)
        names = ("replicate", "shard", "context", "tensor", "pipeline")
        product = " x ".join(f"{name} {getattr(found, name)}" for name in names)
        expected = f"{world_size}, the number of ranks"
        expect(found.world_size == world_size, f"parallel: {product}", found.world_size, expected)
        inner = shard * self.context
        expected = f"a divisor of shard x context = {inner}"
        expect(inner % self.expert == 0, "parallel.expert", self.expert, expected)
        return found

    def describe(self) -> str:
        """Return the degrees above 1, such as `shard 4, tensor 2`."""
        named = ((field.name, getattr(self, field.name) or 1) for field in fields(self))
        return ", ".join(f"{name} {degree}" for name, degree in named if degree > 1)

    def check_model(self, model: ModelArgs) -> None:
        """Refuse a model that cannot be divided in this way, before any process starts.

        Raises:
            RequestError: If a degree does not divide what it is to divide, or the model has a part
                that cannot be divided.
        """
        common = math.gcd(*self._units(model))
        expected = (
            f"a divisor of {common}, the greatest common divisor of the numbers of heads, "
            f"key/value heads and hidden features"
        )
        expect(common % self.tensor == 0, "parallel.tensor", self.tensor, expected)
        layers = model.n_layers
        expected = f"at most the {layers} layers of the model"
        expect(self.pipeline <= layers, "parallel.pipeline", self.pipeline, expected)
        experts = {layer.moe.num_experts for layer in model.layers if layer.moe is not None}
        if self.expert > 1:
            count = math.gcd(*experts) if experts else 1
            divisor = f"a divisor of the {count} experts of the model"
            expected = divisor if experts else "1, since the model has no experts"
            expect(count % self.expert == 0, "parallel.expert", self.expert, expected)
            expected = "1 with parallel.expert: experts are not divided twice"
            expect(self.tensor == 1, "parallel.tensor", self.tensor, expected)
        if self.context_ring:
            plain = all(
                (one.rule.kind, one.attn_softcap, one.attn_sinks, one.mla)
                == ("causal", None, False, None)
                for one in model.layers
            )
            expected = "false for windows, chunks, full or latent attention, soft caps or sinks"
            expect(plain, "parallel.context_ring", True, expected)
        unusual = {
            "qk_norm = projection": any(one.qk_norm == "projection" for one in model.layers),
            "context_dim": model.context_dim is not None,
            "vision_args": model.vision_args is not None,
            "head": model.head is not None,
        }
        found = next((name for name, there in unusual.items() if there), None)
        if self.tensor > 1 or self.context > 1 or self.pipeline > 1:
            expected = "a model without it: tensor, context and pipeline cannot divide it"
            expect(found is None, "parallel: model", found, expected)

    def _units(self, model: ModelArgs) -> list[int]:
        """Return the numbers of heads and hidden features, each of which is divided."""
        units = []
        for layer in model.layers:
            units += [layer.n_heads, layer.hidden_dim]
            units += [] if layer.mla is not None else [layer.n_kv_heads]
            if layer.moe is not None:
                units += [size for size in (layer.moe.hidden_dim,) if size is not None]
                units += [layer.moe.shared_hidden_dim or 0]
        return units
