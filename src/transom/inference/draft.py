"""A smaller model that proposes tokens to a larger one with the same vocabulary."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from transom.base.errors import expect, notice
from transom.cache.model_cache import ModelCache
from transom.chat.marking import common_prefix
from transom.checkpoints.load import LoadPlan
from transom.checkpoints.open_model import OpenedModel, OpenedText, open_model
from transom.inference.decode_args import DEFAULT, DecodeArgs
from transom.inference.decode_plan import decode_plan
from transom.inference.forward import check_finite, forward_logits, not_finite, prefill
from transom.inference.room import check_memory, session_room
from transom.inference.sampler import Sampler, sample
from transom.inference.speculate import Proposal
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.planning.memory import memory_plan

# Greedy drafts end before a token that is less likely than this, as those of transformers do.
CONFIDENCE = 0.4


class DraftModel:
    """A draft model and its KV cache, which follows the text of one conversation.

    Args:
        model: A language model with the vocabulary of the model that it proposes tokens to. It may
            be on another device.
        prefill_step_size: Prompt tokens per forward call.
    """

    def __init__(self, model: LLM, prefill_step_size: int = 512) -> None:
        head, context = model.args.head, model.args.context_dim
        plain = head is None and context is None
        found = head.kind if head is not None else f"context_dim = {context}"
        expect(plain, "draft model", found, "a language model without head and context")
        self.model, self._step_size = model, prefill_step_size
        self._plan = decode_plan(model)
        self._cache: ModelCache | None = None
        self._cached: list[int] = []  # the ids of the tokens in the cache

    def propose(self, tokens: list[int], most: int, sampler: Sampler) -> Proposal:
        """Return tokens that the draft model generates with the options of the sampler.

        Greedy drafts end before a token of low probability. None are proposed beyond the context of
        the draft model; a notice says so.
        """
        cache = self._room_for(len(tokens) + most - 1)
        if most < 1 or cache is None:
            return Proposal()
        same = common_prefix(self._cached, tokens[:-1])
        rows = self.model.args.vocab_size
        if max(tokens[same:]) >= rows:
            notice(f"no tokens are proposed after an id beyond the draft model's {rows}")
            return Proposal()
        beyond, self._cache = len(self._cached) - same, None  # lost if a call is interrupted
        if not cache.rollback(beyond, beyond):
            cache.reset()  # a ring has overwritten keys that it needs
            same = 0
        ids: list[int] = []
        probs: list[Tensor] = []
        logits_1V = prefill(self.model, cache, [tokens[same:]], self._step_size, self._plan)
        while True:
            check_finite(bool(not_finite(logits_1V)), logits_1V.dtype)
            probs_1V = sampler.adjusted(_of_vocabulary(logits_1V, sampler), ids).float().softmax(-1)
            if sampler.args.greedy:
                highest_1, id_1 = probs_1V.max(-1)
                if highest_1 < CONFIDENCE:
                    break
            else:
                id_1 = sample(probs_1V, sampler.uniform(probs_1V.device))
                probs.append(probs_1V[0])
            ids.append(int(id_1))
            if len(ids) == most:
                break
            inputs = TransformerInput(id_1[:, None].to(self.model.device), logits="last")
            logits_1V = forward_logits(self.model, inputs, cache, self._plan)[:, 0]
        self._cache, self._cached = cache, (tokens + ids)[: cache.bound]
        return Proposal(ids, probs)

    def _room_for(self, count: int) -> ModelCache | None:
        """Return the cache, or a larger one, or None if its model can't take so many tokens."""
        limit = self.model.args.max_seq_len
        cache = self._cache
        if cache is None or (cache.bounded and cache.capacity < min(count, limit)):
            cache = self.model.make_cache(1, min(2 * count, limit))
            self._cache, self._cached = cache, []
        if cache.bounded and count > cache.capacity:
            notice(f"no tokens are proposed beyond the draft model's context of {limit} tokens")
            return None
        return cache


def _of_vocabulary(logits_1V: Tensor, sampler: Sampler) -> Tensor:
    """Return logits of the width and on the device of the model that tokens are proposed to.

    Models round their vocabulary up, and two that share a tokenizer may differ in that.
    """
    logits_1V = logits_1V[:, : sampler.vocab].to(sampler.device)
    return F.pad(logits_1V, (0, sampler.vocab - logits_1V.size(1)), value=-math.inf)


def open_draft(
    name: str | None,
    target: OpenedModel,
    decode: DecodeArgs = DEFAULT,
    *,
    device: str = "auto",
    tokens: int | None = None,
) -> DraftModel | None:
    """Open a draft model for a model.

    Args:
        name: As for `open_model`; None opens none.
        target: The model that it proposes tokens to.
        decode: How the model runs; the prefill of both has the same step size.
        device: Its device, which may be another one.
        tokens: Tokens of a request at most; None for those of a conversation.

    Raises:
        RequestError: As for `open_model`; its vocabulary is not that of the model; or it does not
            fit into memory beside the cache of the model, which is not made yet.
    """
    if name is None:
        return None
    model, most = target.model, tokens or session_room(target.model.args, decode)

    def check(_: OpenedText, load: LoadPlan) -> None:
        work = decode.workload(1, most, model.dtype.itemsize, model.device.type)
        plan = memory_plan(model.args, work, {})
        beside = (
            {"the model's cache and buffers": plan.total} if load.device == model.device else {}
        )
        room = min(2 * most, load.args.max_seq_len)
        check_memory(load.args, 1, room, load.dtype, load.device, DEFAULT, load=load, more=beside)

    opened = open_model(name, device=device, before_weights=check)
    target.tokenizer.check_same_tokens(opened.tokenizer, "draft model")
    return DraftModel(opened.model, decode.prefill_step_size)
