"""How many tokens fit: into the context of a model, and with the model into memory."""

from __future__ import annotations

import bisect
import sys

import torch

from transom.base.errors import RequestError, notice, require
from transom.cache.model_cache import SLACK
from transom.checkpoints.load import LoadPlan
from transom.config.model_args import ModelArgs
from transom.inference.decode_args import DecodeArgs
from transom.planning.counts import cache_bytes, working_bytes
from transom.planning.memory import host_bytes_left

MAX_TOKENS = 128  # new tokens of a completion or an answer by default
# Default limit of a conversation, in tokens: the maximum of some models would fill a GPU.
MAX_CONTEXT = 8192


def keeps_every_token(args: ModelArgs) -> bool:
    """Return whether a layer attends to all earlier tokens, so that `max_seq_len` is a limit."""
    return any(layer.rule.size == 0 for layer in args.layers)


def check_room(
    args: ModelArgs, prompt_tokens: int, new_tokens: int, max_model_len: int | None = None
) -> None:
    """Raise a `RequestError` if prompt and new tokens together exceed the context."""
    limit, name = context_limit(args, max_model_len)
    found = f"a prompt of {prompt_tokens} tokens and {new_tokens} new"
    fits = prompt_tokens + new_tokens <= limit
    require(fits, "tokens", found, f"expected {name} = {limit} together")


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
    expected = f"expected 2 to {limit}, the model's max_seq_len"
    require(requested <= limit, "max_model_len", requested, expected)
    return requested


def check_session_memory(load: LoadPlan, decode: DecodeArgs) -> None:
    """Raise a `RequestError` if a model and the cache of a conversation do not fit into memory."""
    room = session_room(load.args, decode)
    check_memory(
        load.args, 1, room, load.dtype, load.device, decode, weight_bytes=load.weight_bytes
    )


def check_memory(
    args: ModelArgs,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    decode: DecodeArgs,
    *,
    weight_bytes: int = 0,
    least: int = 2,
) -> None:
    """Raise a `RequestError` that says what would fit, unless the memory of the device is enough.

    Args:
        args: The model.
        rows: Sequences that are generated together.
        tokens: Tokens of each, those of the prompt included.
        dtype: The dtype of keys and values.
        device: Where the model runs.
        decode: How the model runs.
        weight_bytes: Bytes of the weights, if they are not in memory yet.
        least: Tokens of each sequence without which the request makes no sense.
    """
    left = bytes_left(device)
    if left is None:
        return

    def sizes(tokens: int, kv_bits: int) -> tuple[int, int]:
        """Return the bytes of the KV cache, and of what a forward call computes."""
        cached = cache_bytes(args, rows, tokens, 1 if kv_bits == 8 else dtype.itemsize, SLACK)
        step = min(tokens, decode.prefill_step_size)
        working = working_bytes(args, rows, step, dtype.itemsize)
        if kv_bits == 8:  # the keys and values of a layer are read in the dtype
            working += cached * dtype.itemsize // args.n_layers
        return cached, working

    def fits(tokens: int, kv_bits: int = decode.kv_bits) -> bool:
        return weight_bytes + sum(sizes(tokens, kv_bits)) <= left

    if fits(tokens):
        return
    cached, working = sizes(tokens, decode.kv_bits)
    model = f"a model of {weight_bytes / 1e9:,.2f} GB, " if weight_bytes else ""
    shape = f"{rows:,} x {tokens:,}" if rows > 1 else f"{tokens:,}"
    most = bisect.bisect_left(range(1, tokens), True, key=lambda count: not fits(count))
    most -= most % 10 ** max(0, len(str(most)) - 2)  # two digits are precise enough
    ways = [f"--max-model-len {most}"] if most >= least else []
    ways += ["--kv-bits 8"] if decode.kv_bits != 8 and fits(tokens, 8) else []
    raise RequestError(
        f"memory: got {model}a KV cache of {cached / 1e9:,.2f} GB for {shape} tokens and "
        f"{working / 1e9:,.2f} GB to compute with; expected at most {left / 1e9:,.2f} GB together: "
        + (f"{' or '.join(ways)} fits" if ways else f"{least:,} tokens do not fit either")
    )


def bytes_left(device: torch.device) -> int | None:
    """Return how many bytes can still be allocated on a device; None if that is unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return host_bytes_left() if device.type == "cpu" else None
