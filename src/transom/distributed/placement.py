"""How tensor parallelism places each parameter, and what it cannot divide."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import Placement, Replicate, Shard

from transom.base.errors import expect
from transom.lora.adapters import adapted_modules
from transom.models.llm import LLM
from transom.quantize.leaves import quantized_leaves

# Leaves whose outputs are divided, and leaves whose inputs are.
BY_OUTPUT = ("wq", "wk", "wv", "wq_b", "wkv_b", "w_gate", "w_value", "output", "tok_embeddings")
BY_INPUT = ("wo", "w_out")


def placement(name: str, parameter: Tensor) -> Placement:
    """Return how a parameter is placed on the ranks.

    Args:
        name: The name of the parameter, with those of adapters and quantized leaves.
        parameter: The parameter.
    """
    words = name.split(".")
    last = words[-1]
    if last == "sinks":
        return Shard(0)
    leaf = words[words.index("lora") - 1] if "lora" in words else words[-2]
    if leaf not in BY_OUTPUT + BY_INPUT or last in ("scale_mean", "order"):
        return Replicate()
    outputs, inputs = Shard(int("experts" in words)), Shard(parameter.ndim - 1)
    if "lora" in words:
        whole = "B" if _adapter_by_input(leaf) else "A"
        if last == whole:
            return Replicate()
        return inputs if _adapter_by_input(leaf) else outputs
    if leaf in BY_OUTPUT:
        return outputs
    # A bias is added once, and one scale for all inputs of an output fits every part of them.
    return Replicate() if last == "bias" or parameter.size(-1) == 1 else inputs


def _adapter_by_input(leaf: str) -> bool:
    # The inputs of an adapter of embeddings are the tokens.
    return leaf in BY_INPUT or leaf == "tok_embeddings"


def check_leaves(model: LLM, ranks: int) -> None:
    """Refuse adapters and quantized leaves that so many tensor ranks cannot divide.

    Raises:
        RequestError: If a group of a quantized weight would be cut, or a norm over divided inputs
            is needed.
    """
    for path, leaf in quantized_leaves(model).items():
        *_, outputs, groups = leaf.parts["scales"].shape
        format, (inputs, name) = leaf.format, (leaf.shape[-1], path.rpartition(".")[2])
        if name in BY_INPUT:
            plain = not format.block and not format.ordered
            expect(plain, "parallel.tensor", ranks, f"1: {path} has double_quant or act_order")
            count, what = (groups, "groups of") if groups > 1 else (inputs // 2, "pairs of")
            expected = f"a divisor of the {count} {what} {inputs // count} inputs of {path}"
            expect(count % ranks == 0, "parallel.tensor", ranks, expected)
        elif name in BY_OUTPUT and format.block:
            blocks = -(-outputs * groups // format.block)
            fits = outputs * groups % (format.block * ranks) == 0
            expected = f"a divisor of the {blocks} blocks of {format.block} scales of {path}"
            expect(fits, "parallel.tensor", ranks, expected)
    for path, _, adapters in adapted_modules(model):
        for lora in map(adapters.lora, adapters):
            fits = lora is None or lora.magnitude is None
            expected = f"1: the inputs of {path} would be divided, whose norm DoRA needs"
            divided = _adapter_by_input(path.rpartition(".")[2])
            expect(fits or not divided, "parallel.tensor", ranks, expected)
