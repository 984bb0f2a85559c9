"""How many tokens fit: into the context of a model, and with the model into memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace

import torch

from transom.base.errors import RequestError, expect, notice
from transom.checkpoints.load import LoadPlan
from transom.config.model_args import ModelArgs
from transom.inference.decode_args import MAX_CONTEXT, DecodeArgs
from transom.planning.memory import (
    PREFIX_BYTES,
    MemoryPlan,
    Workload,
    host_bytes_left,
    largest_context,
    memory_plan,
    stored_bytes,
)

MAX_TOKENS = 128  # new tokens of a completion or an answer by default


def keeps_every_token(args: ModelArgs) -> bool:
    """Return whether a layer attends to all earlier tokens, so that `max_seq_len` is a limit."""
    return any(layer.rule.size == 0 for layer in args.layers)


def check_room(
    args: ModelArgs, prompt_tokens: int, new_tokens: int, max_model_len: int | None = None
) -> None:
    """Raise a `RequestError` if prompt and new tokens together exceed the context."""
    limit, name = context_limit(args, max_model_len)
    found = f"a prompt of {prompt_tokens} tokens and {new_tokens} new"
    expect(prompt_tokens + new_tokens <= limit, "tokens", found, f"{name} = {limit} together")


def context_limit(args: ModelArgs, max_model_len: int | None = None) -> tuple[int, str]:
    """Return how many tokens a sequence may have, and the name of what limits it.

    Rings alone set no limit.
    """
    own = args.max_seq_len if keeps_every_token(args) else sys.maxsize
    if max_model_len is None or max_model_len > own:
        return own, "max_seq_len"
    return max_model_len, "max_model_len"


def room_for_new_tokens(
    args: ModelArgs,
    prompt_tokens: int,
    requested: int | None = None,
    max_model_len: int | None = None,
) -> int:
    """Return the new tokens of a request: those requested or `MAX_TOKENS`, but at most what the
    context leaves after the prompt.

    A notice tells of the latter.

    Raises:
        RequestError: The context leaves no room, or the model's own maximum less than requested.
    """
    most = requested or MAX_TOKENS
    limit, name = context_limit(args, max_model_len)
    room = limit - prompt_tokens
    if room < 1 or (requested and name == "max_seq_len"):
        check_room(args, prompt_tokens, most, max_model_len)
    if room < most:
        notice(f"the context of {limit} tokens ({name}) leaves room for {room} new tokens")
    return min(most, room)


def session_room(args: ModelArgs, decode: DecodeArgs) -> int:
    """Return the tokens of a conversation at most.

    Raises:
        RequestError: More are requested than the model is meant for.
    """
    limit, requested = context_limit(args)[0], decode.max_model_len
    if requested is None:
        return limit if limit == sys.maxsize else min(limit, MAX_CONTEXT)
    expect(requested <= limit, "max_model_len", requested, f"2 to {limit}, the model's max_seq_len")
    return requested


def check_session_memory(load: LoadPlan, decode: DecodeArgs) -> int:
    """Return what `check_memory` does for a conversation with a model that is not loaded yet."""
    room = session_room(load.args, decode)
    return check_memory(load.args, 1, room, load.dtype, load.device, decode, load=load)


def check_memory(
    args: ModelArgs,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    decode: DecodeArgs,
    *,
    load: LoadPlan | None = None,
    more: Mapping[str, int] | None = None,
    least: int = 2,
    option: tuple[str, int] = ("--max-model-len", 0),
) -> int:
    """Return the bytes that a request needs beside the weights, if all of it fits into memory.

    Args:
        args: The model.
        rows: Sequences that are generated together.
        tokens: Tokens of each, those of the prompt included.
        dtype: The dtype of keys and values.
        device: Where the model runs.
        decode: How the model runs.
        load: The weights, if they are not in memory yet. A notice tells if those that stay in
            memory maps do not fit.
        more: Bytes of what else needs memory, by name.
        least: Tokens of each sequence without which the request makes no sense.
        option: The option that limits tokens, and how many of them it does not count.

    Raises:
        RequestError: The memory of the device is not enough. The message says what would fit.
    """
    left = least_of(bytes_left(device), None if load is None else load.max_memory)
    weights, mapped = (load.weights, load.mapped_bytes) if load is not None else ({}, 0)
    work, more = decode.workload(rows, tokens, dtype.itemsize, device.type), dict(more or {})
    if decode.prompt_cache_file is not None:
        more["stored prompts"] = stored_bytes(args, work)

    def planned(work: Workload) -> MemoryPlan:
        return memory_plan(args, work, weights, mapped=mapped, more=more)

    plan = planned(work)
    if plan.needed <= left:
        if plan.total > left:
            notice(
                f"memory: {mapped / 1e9:,.2f} GB of weights stay in the map of their file, and "
                f"{(plan.total - left) / 1e9:,.2f} GB of it do not fit: they are read again for "
                "every token"
            )
        return plan.total - sum(weights.values())
    limited = load is not None and load.max_memory is not None
    name = "weights that stay in memory" if limited else "a model"
    parts = {name: sum(weights.values()) - mapped, **more}
    others = "".join(f"{name} of {size / 1e9:,.2f} GB, " for name, size in parts.items() if size)
    shape = f"{rows:,} x {tokens:,}" if rows > 1 else f"{tokens:,}"
    most = largest_context(planned, work, left)
    most -= most % 10 ** max(0, len(str(most)) - 2)  # two digits are precise enough
    ways = [f"{option[0]} {most - option[1]}"] if most >= least else []
    coded = planned(replace(work, kv_bits=8)).needed <= left
    ways += ["--kv-bits 8"] if decode.kv_bits != 8 and coded else []
    raise RequestError(
        f"memory: got {others}a KV cache of {sum(plan.cache.values()) / 1e9:,.2f} GB for {shape} "
        f"tokens and {plan.working / 1e9:,.2f} GB to compute with; expected at most "
        f"{left / 1e9:,.2f} GB together: "
        + (f"{' or '.join(ways)} fits" if ways else f"{least:,} tokens do not fit either")
    )


def prefix_bytes(device: torch.device) -> int:
    """Return the limit for stored beginnings of prompts: at most half of what memory is left."""
    left = bytes_left(device)
    return PREFIX_BYTES if left is None else min(PREFIX_BYTES, left // 2)


def least_of(*limits: int | None) -> int:
    """Return the smallest limit; None is no limit."""
    return min((one for one in limits if one is not None), default=sys.maxsize)


def bytes_left(device: torch.device) -> int | None:
    """Return how many bytes can still be allocated on a device; None if that is unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return host_bytes_left() if device.type == "cpu" else None
