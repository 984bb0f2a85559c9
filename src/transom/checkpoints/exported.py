"""Programs of torch.export: the prefill and one decode step of a model, with its KV cache as inputs
and outputs.

The programs are the model's own forward, traced with a `ModelCache` that is made of input tensors.
They have operators of torch alone, so that a process without Transom runs them. Weights are inputs,
too: both programs share one safetensors file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from transom.attention.backends import in_operators_of_torch
from transom.base.errors import RequestError, expect
from transom.base.files import write_text
from transom.base.runtime import DTYPES, dtype_name, evaluating, replaced
from transom.cache.model_cache import ModelCache
from transom.checkpoints.files.layout import EXPORT, WEIGHTS
from transom.checkpoints.files.lazy_tensors import LazyTensors, cast, main_dtype
from transom.checkpoints.files.safetensors_files import write_tensors
from transom.checkpoints.state import meta_model
from transom.config.model_args import ModelArgs
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.quantize.leaves import quantized_leaves

PREFILL, DECODE = "prefill.pt2", "decode.pt2"
CONTEXT = 2048  # slots of the cache by default
_EXAMPLE = 5  # tokens of the example of a prefill; 0 and 1 would become constants

Cache = dict[str, Tensor]


class TensorCache(ModelCache):
    """A cache of tensors that are inputs of a program. The host knows nothing of what it holds."""

    def reserve(self, count: int, lengths_B: Tensor | None = None) -> bool:
        """Return False: the rows may have tokens."""
        self._first_call = False
        return False

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the cache consist of copies of tensors, under the names of `tensors`."""
        self.bound = self.capacity  # so that queries read all slots
        self.lengths_B = tensors["lengths"].clone()
        for index, store in enumerate(self.stores):
            store.positions_BS = tensors[f"positions.{index}"].clone()
        for index, layer in enumerate(self.layers):
            names = [f"states.{index}.{part}" for part in range(2)]
            layer.states = tuple(tensors[name].clone() for name in names if name in tensors)

    def tensors(self) -> Cache:
        """Return the lengths of the rows, the positions of every store and all states."""
        out = {"lengths": self.lengths_B}
        for index, store in enumerate(self.stores):
            out[f"positions.{index}"] = store.positions_BS
        for index, layer in enumerate(self.layers):
            out |= {f"states.{index}.{part}": x for part, x in enumerate(layer.states)}
        return dict(sorted(out.items()))


class ProgramStep(nn.Module):
    """One call of a model as a function of tensors.

    Args:
        model: The model, whose parameters are inputs of the call.
        capacity: Tokens per row that fit into the cache.
    """

    def __init__(self, model: LLM, capacity: int) -> None:
        super().__init__()
        self._kept, self.capacity = (model,), capacity  # in a tuple: no submodule with parameters

    def forward(
        self, weights: dict[str, Tensor], tokens: Tensor, lengths: Tensor, cache: Cache
    ) -> tuple[Tensor, Cache]:
        """Run one call.

        Args:
            weights: The parameters by name, sorted.
            tokens: int64 [B, T], padded on the right.
            lengths: int64 [B], the real tokens of each row; 0 for none.
            cache: The state before the call, by name, sorted.

        Returns:
            Logits [B, V] after the last real token of each row, and the state after the call. The
            logits of rows that the cache is too small for are NaN.
        """
        model = self._kept[0]
        own = TensorCache.build(model.args, tokens.size(0), self.capacity, slack=0)
        bounded, own.bounded = own.bounded, False
        own.load(cache)
        inputs = TransformerInput(tokens, lengths=lengths, logits="last")
        logits = torch.func.functional_call(model, weights, (inputs, own)).logits[:, 0]
        if bounded:
            logits = logits.masked_fill((own.lengths_B > self.capacity)[:, None], torch.nan)
        return logits, own.tensors()


@dataclass(frozen=True)
class Programs:
    """Programs, and what they are called with.

    Attributes:
        prefill: Two tokens or more per row.
        decode: One token per row.
        weights: The parameters.
        cache: An empty cache: positions are -1, and all else is 0.
        config: The content of `export.json`.
    """

    prefill: torch.export.ExportedProgram
    decode: torch.export.ExportedProgram
    weights: dict[str, Tensor]
    cache: Cache
    config: dict[str, Any]
    file: ClassVar[str] = ""

    def write(self, folder: Path) -> int:
        """Write all files into an existing folder; return the bytes of the weights."""
        for name, program in ((PREFILL, self.prefill), (DECODE, self.decode)):
            content = io.BytesIO()  # torch hides errors of files
            torch.export.save(program, content)
            (folder / name).write_bytes(content.getvalue())
        write_tensors(folder / WEIGHTS, self.weights)
        write_text(folder / EXPORT, json.dumps(self.config, indent=2))
        return sum(weight.nbytes for weight in self.weights.values())


def export_programs(model: LLM, context: int | None = None, batch: int = 1) -> Programs:
    """Return the programs of a model.

    Args:
        model: A language model without active adapters.
        context: Tokens per row that fit into the cache; None is its maximum, and at most 2048.
        batch: Rows of every call.

    Raises:
        RequestError: The model can't be exported, or a number is too small or too large.
    """
    args = model.args
    most = args.max_seq_len
    capacity = min(most, CONTEXT) if context is None else context
    expect(3 <= capacity <= most, "context", capacity, f"3 to max_seq_len = {most}")
    expect(batch >= 1, "batch", batch, "1 or more rows")
    _refuse(model)
    cache = TensorCache.build(args, batch, capacity, slack=0)
    with torch.no_grad(), evaluating(model):  # states are allocated at the first update
        one = torch.zeros(batch, 1, dtype=torch.int64)
        model(TransformerInput(one, logits="none"), cache)
    cache.reset()
    empty = cache.tensors()
    parameters = sorted(model.named_parameters())
    weights = {name: x.detach() for name, x in parameters if not name.startswith("vision.")}
    step, count = ProgramStep(model, capacity), min(_EXAMPLE, capacity)
    with replaced(model, "attend", in_operators_of_torch):
        prefill, decode = (_traced(step, weights, n, capacity, empty) for n in (count, 1))
    shapes = {
        name: _described(x) | {"fill": -1 if name.startswith("positions") else 0}
        for name, x in empty.items()
    }
    config = {
        "torch": str(torch.__version__),
        "context": capacity,
        "batch": batch,
        "vocab_size": args.vocab_size,
        "dtype": dtype_name(model.dtype),
        "inputs": ["weights", "tokens", "lengths", "cache"],
        "outputs": ["logits", "cache"],
        "tokens": {PREFILL: [batch, f"2 to {capacity}"], DECODE: [batch, 1], "dtype": "int64"},
        "lengths": {"shape": [batch], "dtype": "int64"},
        "logits": {"shape": [batch, args.vocab_size], "dtype": dtype_name(model.dtype)},
        "cache": shapes,
        "weights": {name: _described(x) for name, x in weights.items()},
    }
    return Programs(prefill, decode, weights, empty, config)


def _described(x: Tensor) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}


def _refuse(model: LLM) -> None:
    """Raise a `RequestError` for a model that has no program."""
    args, coded = model.args, next(iter(quantized_leaves(model)), None)
    if args.head is not None or args.context_dim is not None:
        found = "a head" if args.head is not None else "attention to a context"
        raise RequestError(f"model: got {found}; expected a language model of tokens alone")
    expect(model.device.type == "cpu", "device", str(model.device), "cpu")
    expected = "dense weights: their products in plain operators take eight times as long"
    expect(coded is None, f"{coded}.weight", "codes", expected)


def dense_model(args: ModelArgs, state: LazyTensors, dtype: str | None) -> LLM:
    """Return a model with these parameters, in a dtype by name or else in `main_dtype`."""
    model, kind = meta_model(args), DTYPES[dtype] if dtype else main_dtype(state)
    # Files may have transposed matrices, which the products of experts do not take.
    parameters = {name: one.read().contiguous() for name, one in cast(state, kind).items()}
    model.load_state_dict(parameters, assign=True)
    return model.eval()


def _traced(
    step: ProgramStep, weights: dict[str, Tensor], count: int, capacity: int, empty: Cache
) -> torch.export.ExportedProgram:
    rows = empty["lengths"].size(0)
    tokens, lengths = torch.zeros(rows, count, dtype=torch.int64), torch.full((rows,), count)
    inputs = weights, tokens, lengths, empty
    sizes = {1: torch.export.Dim("tokens", min=2, max=capacity)} if count > 1 else None
    fixed = [dict.fromkeys(one) for one in (weights, empty)]
    with torch.no_grad():
        shapes = (fixed[0], sizes, None, fixed[1])
        program = torch.export.export(step, inputs, dynamic_shapes=shapes, strict=False)
    program.example_inputs = None  # they would be saved, weights included
    for node in program.graph.nodes:  # paths and lines of this machine's sources
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    return program
