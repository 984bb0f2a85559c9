"""What quantizing costs: bits per byte and divergence of SmolLM2-135M, beside llama.cpp.

The trained weights are those of a Q4_1 file, which codes of four bits with zero points or
minimums in groups of 32 reproduce. So the same function is measured with its channels in another
order, too, in which the groups of the file are spread over all groups. All programs read the same
rows of Python's language reference. `python -m benchmarks quantize:permuted` measures one model,
and `quantize:permuted,GPTQ` the cases whose names contain the word and what they are compared with.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from tests.llama_cpp import LlamaCpp
from transom.checkpoints.files.location import find_model
from transom.checkpoints.open_model import OpenedModel, open_model
from transom.checkpoints.save import save
from transom.data.chat.instructions import NAME as STDLIB
from transom.evaluation.agreement import agreement, batches_of, logits_of, next_tokens
from transom.evaluation.quality import measure_quality, text_bytes, unseen
from transom.evaluation.quantizing import ROWS
from transom.evaluation.token_rows import LENGTH, TokenRows, token_rows
from transom.models.llm import LLM
from transom.quantize.args import QuantizeArgs
from transom.quantize.methods import mean_bits, quantize_model

METHODS = {
    "int8, one scale per output": QuantizeArgs("int8", 0),
    "int4, groups of 64": QuantizeArgs("int4", 64),
    "fp4, groups of 64": QuantizeArgs("fp4", 64),
    "nf4, groups of 64": QuantizeArgs("nf4", 64),
    "int4, groups of 32": QuantizeArgs("int4", 32),
    "int4, groups of 32, AWQ": QuantizeArgs("int4", 32, method="awq"),
    "int4, groups of 32, GPTQ": QuantizeArgs("int4", 32, method="gptq"),
    "4.5 bits by sensitivity, GPTQ": QuantizeArgs("int4", method="gptq", bits_budget=4.5),
    "4.5 bits by sensitivity with embeddings, GPTQ": QuantizeArgs(
        "int4", method="gptq", bits_budget=4.5, embeddings=True
    ),
}
NEAREST = "int4, groups of 32"  # whose loss the methods of the same size recover
FILES = {"q8_0": 8.5, "q4_1": 5.0, "q4_0": 4.5}  # bits of a weight
MODELS = ("permuted", "file")
HELD_OUT = 12_800  # tokens, 50 kB or more


def rows(device: torch.device, part: str = "") -> Iterator[dict[str, Any]]:
    """Yield one row per model and method."""
    model, _, word = part.partition(",")
    for name in MODELS:
        if model in ("", name):
            opened = open_model("smollm2", device=str(device), dtype="float32")
            if name == "permuted":
                permute(opened.model)
            yield from _rows(f"SmolLM2, {name}", opened, word.strip())


def _rows(name: str, opened: OpenedModel, word: str) -> Iterator[dict[str, Any]]:
    location, args = find_model("smollm2"), opened.model.args
    read = token_rows(location, args, STDLIB, tokens=ROWS * LENGTH, joined=True)
    held = unseen(token_rows(location, args, tokens=HELD_OUT, joined=True), read.rows)
    batches, made, seconds = list(batches_of(read.rows)), {}, {}
    chosen = {case: how for case, how in METHODS.items() if word in case}
    if any(case.startswith(NEAREST) for case in chosen):
        chosen = {NEAREST: METHODS[NEAREST], **chosen}
    for case, how in chosen.items():
        start = time.perf_counter()
        asked = QuantizeArgs.from_dict({**vars(how), "scales": "float16"})
        text = batches if how.calibrated else None
        made[case] = quantize_model(copy.deepcopy(opened.model), asked, text)
        seconds[case] = round(time.perf_counter() - start, 1)
    scores = measure_quality(opened.model, made, held.rows, opened.tokenizer, progress=True)
    original = scores["original"]["bits_per_byte"].score
    size = sum(text_bytes(opened.tokenizer, row) for row in held.rows)
    facts = {"held_out_bytes": size, "bits_per_byte": round(original, 5)}
    yield {"benchmark": "quantize", "case": f"{name}: float32", **facts}
    lost = {case: scores[case]["bits_per_byte"].score - original for case in made}
    for case, model in made.items():
        nearest = lost[NEAREST] if case.startswith(NEAREST) and case != NEAREST else None
        yield {
            "benchmark": "quantize",
            "case": f"{name}: {case}",
            "bits_per_weight": round(mean_bits(model), 3),
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
