"""What quantizing costs: bits per byte and divergence of SmolLM2-135M, beside llama.cpp.

The trained weights are those of a Q4_1 file, which codes of four bits with zero points or
minimums in groups of 32 reproduce. So the same function is measured with its channels in another
order, too, in which the groups of the file are spread over all groups. All programs read the same
rows of Python's language reference. `python -m benchmarks quantize:permuted` measures one model,
and `quantize:permuted,GPTQ` the cases whose names contain the word and what they are compared with.
`demo` is the model that `transom demo` has left in `runs/demo`: its methods read the files that it
was trained on, and are measured on files that were held out.
"""

from __future__ import annotations

import copy
import ctypes
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from tests.llama_cpp import LlamaCpp, library
from transom.checkpoints.files.location import ModelLocation, find_model
from transom.checkpoints.open_model import OpenedModel, open_model
from transom.checkpoints.save import save
from transom.cli.demo import CONFIG
from transom.cli.demo import library as standard_library
from transom.data.chat.instructions import NAME as STDLIB
from transom.data.text.sources import SourceArgs, held_out, read_documents
from transom.evaluation.agreement import agreement, batches_of, logits_of, next_tokens
from transom.evaluation.quality import measure_quality, text_bytes, unseen
from transom.evaluation.quantizing import ROWS
from transom.evaluation.token_rows import LENGTH, TokenRows, token_rows
from transom.layers.linear import Linear
from transom.models.llm import LLM
from transom.quantize import ggml
from transom.quantize.args import QuantizeArgs
from transom.quantize.formats import WeightFormat, quantize
from transom.quantize.leaves import dequantize_model, quantized_leaves, replace_weight
from transom.quantize.methods import mean_bits, quantize_model


def _table(*sizes: float) -> WeightFormat:
    """Return the format of values of both signs; the largest weight of a group has the largest."""
    positive = tuple(map(float, sizes))
    return WeightFormat((*positive, *(-size for size in positive)), 64, scales=torch.float16)


# As in Table 2 of QLoRA (arXiv 2305.14314), 64 weights have a scale, by their largest size. The
# last three are its integers and floats; its fp4 of 2 bits of exponent is not that of its code.
METHODS: dict[str, QuantizeArgs | WeightFormat | None] = {
    "int8, one scale per output": QuantizeArgs("int8", 0),
    "int4, groups of 64": QuantizeArgs("int4", 64),
    "fp4, groups of 64": QuantizeArgs("fp4", 64),
    "nf4, groups of 64": QuantizeArgs("nf4", 64),
    "int4 from -7 to 7, groups of 64": _table(0, 1, 2, 3, 4, 5, 6, 7),
    "fp4 with 2 bits of exponent, groups of 64": _table(0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "fp4 with 3 bits of exponent, groups of 64": _table(0, 0.25, 0.5, 1, 2, 4, 8, 16),
    "int4, groups of 32": QuantizeArgs("int4", 32),
    "int4, groups of 32, AWQ": QuantizeArgs("int4", 32, method="awq"),
    "int4, groups of 32, GPTQ": QuantizeArgs("int4", 32, method="gptq"),
    "4.5 bits by sensitivity, GPTQ": QuantizeArgs("int4", method="gptq", bits_budget=4.5),
    "4.5 bits by sensitivity with embeddings, GPTQ": QuantizeArgs(
        "int4", method="gptq", bits_budget=4.5, embeddings=True
    ),
    "Q4_K_M, rounded by llama.cpp": None,
}
NEAREST = "int4, groups of 32"  # whose loss the methods of the same size recover
FILES = {"q8_0": 8.5, "q4_1": 5.0, "q4_0": 4.5}  # bits of a weight
# The numbers by which ggml knows types.
TYPES = {"Q5_0": 6, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14}
MODELS = {"permuted": "smollm2", "file": "smollm2", "demo": CONFIG["out"]}
HELD_OUT = 12_800  # tokens; of SmolLM2, they are 50 kB or more


def rows(device: torch.device, part: str = "") -> Iterator[dict[str, Any]]:
    """Yield one row per model and method."""
    model, _, word = part.partition(",")
    for name, path in MODELS.items():
        if model in ("", name):
            opened = open_model(path, device=str(device), dtype="float32")
            if name == "permuted":
                permute(opened.model)
            shown = f"SmolLM2, {name}" if path == "smollm2" else name
            yield from _rows(shown, find_model(path), opened, word.strip())


def _rows(
    name: str, location: ModelLocation, opened: OpenedModel, word: str
) -> Iterator[dict[str, Any]]:
    read, held = _texts(name, location, opened)
    batches, made, bits, seconds = list(batches_of(read.rows)), {}, {}, {}
    chosen = {case: how for case, how in METHODS.items() if word in case}
    if any(case.startswith(NEAREST) for case in chosen):
        chosen = {NEAREST: METHODS[NEAREST], **chosen}
    for case, how in chosen.items():
        start = time.perf_counter()
        made[case] = copy.deepcopy(opened.model)
        bits[case] = _quantize(made[case], how, batches)
        seconds[case] = round(time.perf_counter() - start, 1)
        if quantized_leaves(made[case]):
            dequantize_model(made[case])  # else every row would do so
    scores = measure_quality(opened.model, made, held.rows, opened.tokenizer, progress=True)
    original = scores["original"]["bits_per_byte"].score
    size = sum(text_bytes(opened.tokenizer, row) for row in held.rows)
    facts = {"held_out_bytes": size, "bits_per_byte": round(original, 5)}
    yield {"benchmark": "quantize", "case": f"{name}: float32", **facts}
    lost = {case: scores[case]["bits_per_byte"].score - original for case in made}
    for case in made:
        nearest = lost[NEAREST] if case.startswith(NEAREST) and case != NEAREST else None
        yield {
            "benchmark": "quantize",
            "case": f"{name}: {case}",
            "bits_per_weight": round(bits[case], 3),
            "bits_per_byte": round(original + lost[case], 5),
            "loss": round(lost[case], 5),
            "loss_share": round(lost[case] / original, 5),
            "kl": round(scores[case]["kl"].score, 5),
            "same_first_choice": round(scores[case]["top1_agreement"].score, 4),
            "recovered": None if nearest is None else round(1 - lost[case] / nearest, 3),
            "seconds": seconds[case],
        }
    del made
    if word in "llama.cpp":  # also without a word
        yield from _llama_cpp(name, opened, held, original)


def _texts(name: str, location: ModelLocation, opened: OpenedModel) -> tuple[TokenRows, TokenRows]:
    """Return the rows that methods read, and others to measure on."""
    args, most = opened.model.args, ROWS * LENGTH
    if name != "demo":
        read = token_rows(location, args, STDLIB, tokens=most, joined=True)
        return read, unseen(token_rows(location, args, tokens=HELD_OUT, joined=True), read.rows)
    texts: dict[bool, list[str]] = {False: [], True: []}
    for document in read_documents(SourceArgs(**standard_library())):
        texts[held_out(document.id, CONFIG["data"]["held_out"])].append(document.text)
    with tempfile.TemporaryDirectory() as folder:
        for which, own in texts.items():
            Path(folder, f"{which}.txt").write_text("".join(own), encoding="utf-8")
        read, held = (
            token_rows(location, args, f"{folder}/{which}.txt", tokens=count, joined=True)
            for which, count in ((False, most), (True, 2 * HELD_OUT))  # its tokens are shorter
        )
    return read, unseen(held, read.rows)


@torch.no_grad()
def _quantize(
    model: LLM, how: QuantizeArgs | WeightFormat | None, batches: list[torch.Tensor]
) -> float:
    """Quantize a model in place, and return the bits of a weight."""
    if isinstance(how, QuantizeArgs):
        asked = QuantizeArgs.from_dict({**vars(how), "scales": "float16"})
        return mean_bits(quantize_model(model, asked, batches if how.calibrated else None))
    if how is None:
        return _round_as_q4_k_m(model)
    for path, leaf in list(model.named_modules()):
        if isinstance(leaf, Linear) and path != "output":
            replace_weight(leaf, quantize(leaf.weight, how), how)
    return mean_bits(model)


def _round_as_q4_k_m(model: LLM) -> float:
    """Round the weights of a Llama as a Q4_K_M file has them, and return the bits of a weight.

    Types follow `llama_tensor_get_type` of llama.cpp, and its functions round without an importance
    matrix. The model stays dense, so activations are not rounded.
    """
    count, size, total = len(model.layers), 0, 0
    for path, weight in model.named_parameters():
        if weight.ndim == 1:
            continue
        words = path.split(".")
        more = words[0] in ("output", "tok_embeddings" if model.output is None else "output")
        if words[-2] in ("wv", "w_out"):
            i, first = int(words[1]), count // 8
            more = i < first or i >= 7 * count // 8 or (i - first) % 3 == 2
        plain = weight.size(1) % 256 == 0
        kind = ("Q6_K" if plain else "Q8_0") if more else "Q4_K" if plain else "Q5_0"
        blocks = torch.empty(len(weight), ggml.row_bytes(kind, weight.size(1)), dtype=torch.uint8)
        library().ggml_quantize_chunk(
            ctypes.c_int(TYPES[kind]),
            ctypes.c_void_p(weight.contiguous().data_ptr()),
            ctypes.c_void_p(blocks.data_ptr()),
            *map(ctypes.c_int64, (0, *weight.shape)),
            None,
        )
        weight.copy_(ggml.dense(kind, blocks))
        size, total = size + 8 * blocks.numel(), total + weight.numel()
    return size / total


def _llama_cpp(
    name: str, opened: OpenedModel, held: TokenRows, original: float
) -> Iterator[dict[str, Any]]:
    """Yield a row for each type of GGUF file that llama.cpp reads."""
    size = sum(text_bytes(opened.tokenizer, row) for row in held.rows)
    sums = {dtype: [0.0, 0.0, 0.0] for dtype in FILES}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        peers = {}
        for dtype in FILES:
            path = Path(folder) / f"{dtype}.gguf"
            save(opened.model, path, "gguf", opened.tokenizer, dtype)
            peers[dtype] = stack.enter_context(LlamaCpp(path, LENGTH))
        for row in held.rows:
            expected = torch.cat(list(logits_of(opened.model, [row])))
            for dtype, peer in peers.items():
                logits = torch.from_numpy(peer.logits(row.tolist()))
                found = agreement([expected], [logits], next_tokens([row]))
                assert found.nats is not None, "there are targets"
                own = (found.nats * (len(row) - 1), found.kl * len(row), len(row) - found.flips)
                sums[dtype] = [total + one for total, one in zip(sums[dtype], own, strict=True)]
    for dtype, (nats, kl, same) in sums.items():
        bits = nats / math.log(2) / size
        yield {
            "benchmark": "quantize",
            "case": f"{name}: llama.cpp {dtype.upper()}",
            "bits_per_weight": FILES[dtype],
            "bits_per_byte": round(bits, 5),
            "loss": round(bits - original, 5),
            "loss_share": round(bits / original - 1, 5),
            "kl": round(kl / held.tokens, 5),
            "same_first_choice": round(same / held.tokens, 4),
        }


@torch.no_grad()
def permute(model: LLM) -> None:
    """Put the channels of a Llama in another order; what it computes stays the same."""
    draws, args, layer = torch.Generator().manual_seed(0), model.args, model.args.layers[0]
    stream = torch.randperm(args.dim, generator=draws)
    width_inside = model.get_parameter("layers.0.feed_forward.w_out.weight").size(1)
    hidden = torch.randperm(width_inside, generator=draws)
    width, shared = layer.head_dim, args.n_heads // layer.n_kv_heads
    heads = torch.randperm(width, generator=draws) + width * torch.arange(args.n_heads)[:, None]
    values, seen = heads[: args.n_heads // shared].flatten(), heads.flatten()
    # The outputs and the inputs of every matrix.
    every = slice(None)
    orders = {
        "tok_embeddings": (every, stream),
        "wq": (every, stream),
        "wk": (every, stream),
        "wv": (values, stream),
        "wo": (stream, seen),
        "w_gate": (hidden, stream),
        "w_value": (hidden, stream),
        "w_out": (stream, hidden),
    }
    for path, weight in model.named_parameters():
        outputs, inputs = orders.get(path.split(".")[-2], (stream, every))
        weight.copy_(weight[outputs][:, inputs] if weight.ndim > 1 else weight[outputs])
