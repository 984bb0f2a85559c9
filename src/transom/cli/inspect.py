"""`transom inspect`: the plan of a model layer by layer, a trace of it on a text, or the
differences of two models.

The plan is arithmetic on the arguments: no weights are read and torch is not imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from transom.base.errors import RequestError, expect, notice
from transom.checkpoints.describe_model import DescribedModel, describe_model
from transom.checkpoints.quantized.config import stated_quantization
from transom.cli.main import user_path
from transom.cli.options import (
    MODEL,
    add_fields,
    add_keep_quantized,
    add_offloading,
    add_revision,
    offloading,
    option,
    read_fields,
    require_unset,
)
from transom.config.presets import PRESETS
from transom.inference.decode_args import MAX_CONTEXT, DecodeArgs
from transom.inference.memory_answer import MemoryAnswer, memory_answer
from transom.planning.layer_plan import ModelPlan, groups, index_words, plan
from transom.planning.tables import (
    amount,
    byte_words,
    counted,
    fits_terminal,
    flop_words,
    heading,
    pairs,
    show,
    table,
    visible,
)

if TYPE_CHECKING:
    from rich.table import Table

    from transom.evaluation.trace import LayerTrace
    from transom.tokenizers.tokenizer import Tokenizer

MEMORY_FLAGS = (
    *("context", "batch", "draft_model", "keep_quantized", "kv_bits", "prefill_step_size"),
    *("offload", "max_memory"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    what = f"{MODEL}, config.json, params.json, or a preset: {', '.join(PRESETS)}"
    option(parser, "MODEL", what, user_path)
    option(parser, "OTHER", "a second model or run to compare with", user_path, nargs="?")
    add_revision(parser)
    option(parser, "--length LENGTH", "sequence length in tokens (default: max_seq_len)", int)
    option(parser, "--json", "print one JSON document with exact numbers, no tables")
    option(parser, "--trace TEXT", "run the model on TEXT and show what every layer computes")
    what = "show what will be in memory while the model generates, and what would fit; load nothing"
    option(parser, "--memory", what)
    what = "tokens per row of --memory (default: max_seq_len, at most 8192)"
    option(parser, "--context N", what, int)
    option(parser, "--batch B", "rows of --memory (default: 1)", int)
    option(parser, "--draft-model MODEL", "a draft model for --memory", user_path)
    add_keep_quantized(parser)
    add_offloading(parser)
    add_fields(parser, DecodeArgs, ("kv_bits", "prefill_step_size"))
    what = "device of --trace or --memory: cpu, cuda, mps or auto (default: cpu)"
    option(parser, "--device DEVICE", what)
    option(parser, "--dtype DTYPE", "dtype in --trace or --memory (default: that of the files)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print a plan, a trace or a comparison."""
    check_flags(options)
    if options.other is not None:
        from transom.cli.compare import run_compare

        return run_compare(options)
    model = describe_model(options.model, options.revision, settings_only=options.trace is None)
    if options.trace is not None:
        return run_trace(model, options)
    if options.memory:
        return run_memory(model, options)
    planned = plan(model.args, options.length)
    if planned.length > planned.max_seq_len:
        notice(f"--length {planned.length} is longer than max_seq_len = {planned.max_seq_len}")
    if not options.json:
        print_plan(model, planned)
    more = {} if model.adapter is None else {"adapter": model.adapter}
    return {"model": model.name, "args": model.args.to_dict(), **asdict(planned), **more}


def check_flags(options: argparse.Namespace) -> None:
    """Raise a `RequestError` for a flag that would have no effect."""
    traced, sized = options.trace is not None, options.memory
    require_unset(options, sized, "with --memory", *MEMORY_FLAGS)
    require_unset(options, sized or traced, "with --memory or --trace", "device", "dtype")
    require_unset(options, not traced, "without --trace", "memory")
    require_unset(options, not (traced or sized), "without --trace and --memory", "length")


# The plan.


def print_plan(model: DescribedModel, planned: ModelPlan) -> None:
    """Print the table of layers and the totals."""
    layers = counted(len(planned.layers), "layer")
    heading(f"{model.name}: {amount(planned.parameters)} parameters in {layers}")
    if model.adapter is not None:
        kind, rank, alpha, targets = (
            model.adapter[key] for key in ("kind", "rank", "alpha", "targets")
        )
        print(f"adapter: {kind} of rank {rank}, alpha {alpha:g}, on {', '.join(targets)}")
        print("All numbers are those of the model without the adapter.")
    stated = None if model.location is None else stated_quantization(model.location.model)
    if stated is not None:
        print(f"weights in codes: {stated}; --memory shows their sizes")
    show(layer_table(planned))
    print("Equal layers share one row, whose numbers are those of one of them.")
    heading("Totals")
    show(pairs(total_lines(planned)))


def layer_table(planned: ModelPlan) -> Table:
    """Return a table with one row for all layers that are equal, turned by 90 degrees in a
    narrow terminal.
    """
    rows = []
    for alike in groups(planned.layers):
        layer, indices = alike[0], tuple(one.index for one in alike)
        words = (index_words(indices), layer.attention, layer.positions, layer.heads)
        cached = byte_words(layer.kv_bytes_per_token["bfloat16"]) if planned.cacheable else "-"
        numbers = (amount(layer.parameters), cached, flop_words(layer.flops_per_token))
        rows.append((*words, "yes" if layer.qk_norm else "no", layer.feed_forward, *numbers))
    titles = ("layer", "attention", "positions", "heads", "QK-norm", "feed-forward")
    number_titles = ("parameters", "KV bytes/token", "FLOPs/token")
    wide = table(titles, number_titles, rows)
    if fits_terminal(wide):
        return wide
    turned = list(zip((*titles, *number_titles), *rows, strict=True))
    return table(turned[0], (), turned[1:])


def total_lines(planned: ModelPlan) -> list[tuple[str, str]]:
    """Return the name and the value of every total."""
    parts = [
        f"{amount(sum(layer.parameters for layer in planned.layers))} layers",
        f"{amount(planned.embedding_parameters)} token embeddings",
        "tied output" if planned.tied else f"{amount(planned.output_parameters)} output",
        f"{amount(planned.final_norm_parameters)} final norm",
        *([f"{amount(planned.vision_parameters)} vision"] if planned.vision_parameters else []),
    ]
    lines = [("parameters", f"{amount(planned.parameters)} = {' + '.join(parts)}")]
    if planned.active_parameters != planned.parameters:
        share = planned.active_parameters / planned.parameters
        lines.append(
            ("active", f"{amount(planned.active_parameters)} parameters per token ({share:.1%})")
        )
    lines.append(("weights", _by_dtype(planned.weight_bytes)))
    per = f"one sequence of {planned.length:,} tokens"
    if planned.cacheable:
        lines.append(("KV bytes/token", _by_dtype(planned.kv_bytes_per_token)))
        lines.append(("KV cache", f"{_by_dtype(planned.kv_bytes)}, for {per}"))
    else:
        lines.append(("KV cache", "none: a layer sees later tokens, so nothing can be cached"))
    output = flop_words(planned.output_flops_per_token)
    flops = f"{flop_words(planned.flops_per_token)} forward ({output} of it the output)"
    training = f"{flop_words(planned.training_flops_per_token)} training"
    return [
        *lines,
        ("FLOPs/token", f"{flops}, {training}, mean over {per}, matrix products only"),
        ("vocabulary", f"{planned.vocab_size:,} tokens"),
        ("longest sequence", f"{planned.max_seq_len:,} tokens"),
    ]


def _by_dtype(sizes: dict[str, int]) -> str:
    return ", ".join(f"{byte_words(size)} in {dtype}" for dtype, size in sizes.items())


# The memory.


def run_memory(model: DescribedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Print what a model needs in memory, by category, and what would fit."""
    draft = None if options.draft_model is None else describe_model(options.draft_model)
    answer = memory_answer(
        model,
        min(model.args.max_seq_len, MAX_CONTEXT) if options.context is None else options.context,
        1 if options.batch is None else options.batch,
        decode=read_fields(options, DecodeArgs),
        device=options.device or "cpu",
        dtype=options.dtype,
        keep_quantized=options.keep_quantized,
        draft=draft,
        offload=offloading(options),
    )
    if not options.json:
        print_memory(model.name, answer, options.offload)
    totals = {"total": answer.plan.total, "needed": answer.plan.needed}
    return {"model": model.name, **asdict(answer), **totals}


def print_memory(name: str, answer: MemoryAnswer, offload: str | None) -> None:
    """Print the table of categories, and what fits."""
    plan, work = answer.plan, answer.work
    shape = f"{counted(work.rows, 'row')} of {work.tokens:,} tokens"
    heading(f"{name} in {answer.dtype} on {answer.device}: {shape}")
    rows = [(f"weights: {kind}", size) for kind, size in plan.weights.items()]
    rows += [(f"KV cache: {kind}", size) for kind, size in plan.cache.items()]
    rows += [("prefill of the prompt, about", plan.prefill), ("decode step, about", plan.decode)]
    rows += [("logits and sampling, about", plan.logits), *plan.more.items()]
    rows += [("in all, with the larger of prefill and decode", plan.total)]
    rows += [("of it in maps of files, which need not fit", plan.mapped)] if plan.mapped else []
    show(table(("what",), ("size", "bytes"), [(k, byte_words(n), f"{n:,}") for k, n in rows]))
    if answer.placement is not None:
        streamed = index_words(answer.placement.streamed) or "none"
        size = byte_words(answer.placement.streamed_bytes)
        print(f"Layers that are streamed from {offload}: {streamed}, {size} per call.")
    if answer.prefix_limit:
        print(
            f"A chat also stores beginnings of prompts: {byte_words(answer.prefix_limit)} at most."
        )
    if answer.left is not None:
        most = f"up to {answer.most_tokens:,} tokens at batch {work.rows:,}"
        batch = f"up to batch {answer.most_rows:,} at {work.tokens:,} tokens"
        print(f"{byte_words(answer.left)} are free here. Fits: {most}, and {batch}.")


# The trace.


def run_trace(model: DescribedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Load the model, run one forward pass on the text and print what every layer did."""
    if model.location is None:
        raise RequestError(f"--trace: {model.name} has no weights; expected a model or run folder")
    import torch

    from transom.checkpoints.open_model import open_model
    from transom.evaluation.trace import trace

    opened = open_model(model.location, device=options.device or "cpu", dtype=options.dtype)
    tokenizer = opened.tokenizer
    ids = tokenizer.encode_prompt(options.trace)
    limit = model.args.max_seq_len
    expect(
        0 < len(ids) <= limit,
        "--trace",
        f"a text of {len(ids)} tokens",
        f"1 to {limit} tokens",
    )
    layers = trace(opened.model, torch.tensor([ids], device=opened.model.device))
    if not options.json:
        print_trace(model.name, ids, tokenizer, layers)
    return trace_document(model.name, ids, tokenizer, layers)


def print_trace(
    name: str, ids: Sequence[int], tokenizer: Tokenizer, layers: Sequence[LayerTrace]
) -> None:
    """Print the residual stream after every block, then where every head of the last token
    looks.
    """

    def shown(id: int) -> str:
        return visible(tokenizer.token_text(id))

    last = f"the last is {shown(ids[-1])} at position {len(ids) - 1:,}"
    heading(f"{name}: {counted(len(ids), 'token')}, {last}")
    rows, heads, mixed = [], [], any(layer.experts for layer in layers)
    for index, layer in enumerate(layers):
        guesses = ", ".join(f"{shown(id)} {share:.1%}" for id, share in layer.predictions)
        chosen = ", ".join(f"{id} ({weight:.3f})" for id, weight in layer.experts) or "-"
        words = (str(index), guesses, *([chosen] if mixed else []))
        sizes = (layer.attention_rms, layer.feed_forward_rms, layer.residual_rms)
        rows.append((*words, *(f"{size:.4g}" for size in sizes)))
        for head, entropy in enumerate(layer.entropy_N.tolist()):
            position, weight = layer.strongest[head]
            key = (shown(ids[position]), str(position), f"{weight:.3f}")
            heads.append((str(index), str(head), f"{entropy:.3f}", *key))
    titles: tuple[str, ...] = ("layer", "next token, if the model ended here")
    titles += ("experts (weight)",) if mixed else ()
    show(table(titles, ("attention RMS", "feed-forward RMS", "residual RMS"), rows))
    print("RMS is the root mean square over features, averaged over tokens.")
    heading("Attention heads")
    show(table((), ("layer", "head", "entropy", "strongest key", "position", "weight"), heads))
    print("Entropy is in nats, averaged over tokens: 0 is one key, ln n is equal weight on n keys.")
    print("The strongest key is the token that the last token attends to most.")


def trace_document(
    name: str, ids: Sequence[int], tokenizer: Tokenizer, layers: Sequence[LayerTrace]
) -> dict[str, Any]:
    """Return the trace as plain data, unrounded."""

    def token(id: int) -> dict[str, Any]:
        return {"id": id, "text": tokenizer.token_text(id)}

    def document(index: int, layer: LayerTrace) -> dict[str, Any]:
        names = ("entropy_nats", "strongest_position", "weight")
        heads = zip(layer.entropy_N.tolist(), layer.strongest, strict=True)
        return {
            "index": index,
            **{
                key: getattr(layer, key)
                for key in ("residual_rms", "attention_rms", "feed_forward_rms")
            },
            "heads": [dict(zip(names, (entropy, *key), strict=True)) for entropy, key in heads],
            "experts": [{"id": id, "weight": weight} for id, weight in layer.experts],
            "predictions": [{**token(id), "probability": share} for id, share in layer.predictions],
        }

    documents = [document(index, layer) for index, layer in enumerate(layers)]
    return {"model": name, "tokens": [token(id) for id in ids], "layers": documents}
