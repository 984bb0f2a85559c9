"""Rows of fine-tuning: which tokens carry loss, and the loss of each example in every layout.

The answers are found a second time in the text that a template writes, without `data/chat/turns.py`
and without tokens.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.errors import Problem, notice
from transom.chat.built_in import named
from transom.chat.template import ChatTemplate
from transom.data.batch import NO_TARGET, Batch
from transom.data.chat.batches import packed_batch, padded_batch
from transom.data.chat.conversations import ChatExample, example_of
from transom.data.chat.messages import Message
from transom.data.chat.rows import ChatEncoder
from transom.data.chat.turns import EncodedChat
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import train_bpe
from transom.training.losses.objectives import NextToken, Objective
from transom.verify.findings import TOLERANCES, Finding, close, exact

Answer = tuple[str, float]  # the text with loss, and its weight
Items = Sequence[tuple[EncodedChat, ...]]  # one row each, or two of a pair

ROWS = 16  # examples that are compared in one batch
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
CONTROL = (
    *(BEGIN, END, "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
)
# Bytes, control tokens, and some merges that may cross the ends of turns.
VOCABULARY = 256 + len(CONTROL) + 40
TEMPLATES = ("chatml", "llama3", "mistral-v3", "mistral-v3-tekken", "gemma", "plain")
# Zephyr's template with the `generation` blocks of TRL, which leave out the end of the turn.
OWN_TEMPLATE = """\
{%- for message in messages %}{{ '<|' + message.role + '|>\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{%- else %}{{ message.content }}{% endif %}{{ eos_token + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""


def _chat(
    *contents: str, system: str | None = None, weights: Mapping[int, float] | None = None
) -> dict[str, Any]:
    """Return a row of questions and answers by turns; `weights` are those of the n-th answers."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for index, content in enumerate(contents):
        message: dict[str, Any] = {"role": ("user", "assistant")[index % 2], "content": content}
        if index % 2 and weights and index // 2 in weights:
            message["weight"] = weights[index // 2]
        messages.append(message)
    return {"messages": messages}


CHATS = (
    _chat("Capital of Peru?", "It is Lima.", "And of Chile?", "Santiago.", system="Be brief."),
    _chat("Say one.", "One it is.", "Say two.", "Two, then.", "Three?", "3!", weights={0: 0.0}),
    _chat("Half of it?", "A half.", "The rest?", "The other half.", weights={0: 0.5}),
    _chat(
        "What is <|im_end|> or </s>?",
        "The word <|im_end|> and <end_of_turn>, spelled.\n\nThat is all.",
    ),
    _chat("Grüße, 世界?", "Привет 👋"),
    {"prompt": "Two and two", "completion": "make four."},
)
PAIRS = (
    {"prompt": "Capital of Italy?", "chosen": "Rome.", "rejected": "It is Oslo, I think."},
    {"prompt": "Two and three", "chosen": "make five.", "rejected": "make six."},
)


def examples_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[ChatExample]:
    """Return rows as examples, as they are read from a file."""
    return [example_of(row, f"{name} {index}") for index, row in enumerate(rows)]


def sample_encoders() -> dict[str, ChatEncoder]:
    """Return encoders with every kind of built-in template, the template of a folder and none.

    Their padding token is their EOS.
    """
    text = json.dumps([CHATS, PAIRS], ensure_ascii=False)
    tokenizer = train_bpe([text], VOCABULARY, CONTROL)
    tokenizer.pad_id = tokenizer.eos_id
    own = ChatTemplate(OWN_TEMPLATE, tokenizer)
    templates: dict[str, ChatTemplate | None] = {"no template": None, "template of the folder": own}
    for name in TEMPLATES:
        ready = named(name)
        assert ready is not None, "these templates are built in"
        template = ChatTemplate(ready.source(tokenizer), tokenizer, stop=ready.stop)
        templates[f"template {name}"] = template
    return {name: encoder_of(tokenizer, one, 512) for name, one in templates.items()}


def encoder_of(tokenizer: Tokenizer, template: ChatTemplate | None, seq_len: int) -> ChatEncoder:
    """Return an encoder that drops examples of more than `seq_len` tokens."""
    return ChatEncoder(tokenizer, template, seq_len, truncate="drop")


# -- loss masks


def compare_masks(
    examples: Sequence[ChatExample], encoder: ChatEncoder, name: str
) -> Iterator[Finding]:
    """Compare the tokens with loss, and their weights, with the answers of every example.

    A notice counts the examples that cannot be compared: texts, those that the template cannot
    write, those that are too long, and those whose answer the template writes differently from a
    continuation of the prompt.
    """
    chats = [one for one in examples if one.kind not in ("text", "answer")]
    problems: list[Problem] = []
    encoded = {one.id: encoder.encode([one], problems) for one in chats}
    refused = {problem.where for problem in problems}
    long = {id for id, rows in encoded.items() if rows.counts["dropped"]}
    expected = {one.id: answers_of(one, encoder) for one in chats if one.id not in refused}
    differs = {id for id, answers in expected.items() if answers is None}
    for count, reason in (
        (len(examples) - len(chats), "are not conversations"),
        (len(problems), f"cannot be written ({problems[0].sentence})" if problems else ""),
        (len(long), "are too long"),
        (len(differs), "have answers that the template does not write after their prompt"),
    ):
        if count:
            notice(f"{name}: {count} examples are not compared, since they {reason}")
    compared = [one for one in chats if one.id in expected and one.id not in long | differs]
    wrong = [one.id for one in compared if bool(encoded[one.id].items) != bool(expected[one.id])]
    yield exact("examples without loss have no answer", name, wrong)
    kept = [one for one in compared if encoded[one.id].items]
    for start in range(0, len(kept), ROWS):
        group = kept[start : start + ROWS]
        items = [item for one in group for item in encoded[one.id].items]
        for layout, batch in layouts(items):
            measured: dict[str, Counter[Answer]] = {one.id: Counter() for one in group}
            texts = _texts_with_loss(batch, encoder.tokenizer)
            for row, answers in zip(chain(*items), texts, strict=True):
                measured[row.id].update(answers)
            for one in group:
                more = measured[one.id] - Counter(expected[one.id])
                less = Counter(expected[one.id]) - measured[one.id]
                detail = f"loss on {dict(more)}, expected on {dict(less)}"
                case, wrong_texts = f"{name}, {one.id}", (more | less).total()
                yield exact(f"loss on answers alone, {layout}", case, wrong_texts, detail)


def answers_of(example: ChatExample, encoder: ChatEncoder) -> list[Answer] | None:
    """Return all answers with loss, or None if the template does not write one after its prompt."""
    answers: list[Answer] = []
    tokenizer = encoder.tokenizer
    for messages, weight in _answered(example):
        if encoder.template is None:
            end = None if tokenizer.eos_id is None else tokenizer.id_to_token(tokenizer.eos_id)
            text: str | None = f"{messages[-1]['content']}{end or ''}"
        else:
            text = _continuation(encoder.template, messages, example.tools)
        if text is None:
            return None
        answers.append((_normalized(text, tokenizer), weight))
    return answers


def _answered(example: ChatExample) -> Iterator[tuple[tuple[Message, ...], float]]:
    """Yield the messages up to each answer with loss, and the weight of the answer."""
    first = len(example.messages) if example.kind in ("pair", "label") else 0
    for answer in example.answers or ((),):
        messages = example.messages + answer
        for index, message in enumerate(messages):
            weight = message.get("weight", 1.0) * example.weight
            if message["role"] == "assistant" and weight > 0 and index >= first:
                yield messages[: index + 1], weight


def _continuation(template: ChatTemplate, messages: Sequence[Message], tools: Any) -> str | None:
    """Return the last message as it follows its prompt, up to the control token that ends it.

    Calls of tools may contain control tokens, so that they end with the last one.
    """
    if len(messages) < 2:
        return None
    plain = [{key: message[key] for key in message if key != "weight"} for message in messages]
    prompt = template.render(plain[:-1], tools)
    text = template.render(plain, tools, add_generation_prompt=False)
    if not text.startswith(prompt):
        return None
    text, content = text[len(prompt) :], plain[-1].get("content")
    calls = any(name in text for name in _calls(plain[-1]))
    words = content.strip() if isinstance(content, str) and not calls else ""
    start = text.rfind(words) + len(words) if words and words in text else 0
    tokens = sorted(template.tokenizer.special_tokens, key=len, reverse=True)
    ends = [found.end() for found in re.finditer("|".join(map(re.escape, tokens)), text[start:])]
    if not tokens or not ends:
        return None
    return text[: start + ends[-1 if calls else 0]]


def _calls(message: Mapping[str, Any]) -> list[str]:
    """Return the names of the tools that a message calls."""
    return [call["function"]["name"] for call in message.get("tool_calls", ())]


def _texts_with_loss(batch: Batch, tokenizer: Tokenizer) -> Iterator[list[Answer]]:
    """Yield for each example the text of every run of targets that have the same weight."""
    targets, weights = batch.targets.flatten(), target_weights(batch).flatten()
    for part in _parts(batch):
        pairs = zip(targets[part].tolist(), weights[part].tolist(), strict=True)
        answers = []
        for weight, run in groupby(pairs, key=lambda pair: pair[1]):
            if weight > 0:
                text = tokenizer.decode([id for id, _ in run], skip_special=False)
                answers.append((_normalized(text, tokenizer), weight))
        yield answers


def _normalized(text: str, tokenizer: Tokenizer) -> str:
    """Return composed text, without the space that some vocabularies put in front."""
    composed = unicodedata.normalize("NFC", text)
    return composed.lstrip(" ") if tokenizer.raw_byte_ids else composed


# -- layouts


def layouts(items: Items) -> Iterator[tuple[str, Batch]]:
    """Yield all rows in one padded batch and, unless they are pairs, in two packed rows."""
    yield "padded", padded_batch(items)
    if len(items[0]) == 1:
        rows = [row for (row,) in items]
        half = -(-len(rows) // 2)
        yield "packed", packed_batch([part for part in (rows[:half], rows[half:]) if part])


def target_weights(batch: Batch) -> Tensor:
    """Return the loss weight of every target, [B, T], 0 where there is no target."""
    weights_BT = (batch.targets != NO_TARGET).float()
    return weights_BT if batch.weights is None else weights_BT * batch.weights


def _parts(batch: Batch) -> Iterator[slice]:
    """Yield the place of each example among the columns of all rows laid end to end."""
    if batch.sizes is not None:
        sizes = list(chain(*batch.sizes))
        starts = [0, *accumulate(sizes)]
    else:
        assert batch.lengths is not None, "rows are packed or padded"
        sizes = batch.lengths.tolist()
        starts = [row * batch.tokens.size(1) for row in range(len(sizes))]
    for start, size in zip(starts, sizes, strict=False):
        yield slice(start, start + size)


# -- the loss of one example


@torch.no_grad()
def compare_losses(model: LLM, items: Items, name: str) -> Iterator[Finding]:
    """Compare the loss of every example in a packed and a padded batch with its loss alone.

    The loss of a step, in one batch and in micro-batches, must be the sum of its examples.
    """
    rows = list(chain(*items))
    alone = []
    for row in rows:
        ids_T = torch.as_tensor(row.ids, device=model.device).long()
        weights_T = torch.as_tensor(row.weights[1:], device=model.device)
        logits = model(TransformerInput(ids_T[None, :-1])).logits
        alone.append(weighted_nats(logits[0], ids_T[1:], weights_T))
    expected = torch.stack(alone).sum() / sum(float(row.weights[1:].sum()) for row in rows)
    tolerance = TOLERANCES[alone[0].dtype]
    for layout, batch in layouts(items):
        batch = batch.to(model.device)
        logits = model(batch.inputs()).logits.flatten(0, 1)
        targets, weights = batch.targets.flatten(), target_weights(batch).flatten()
        for row, loss, part in zip(rows, alone, _parts(batch), strict=True):
            measured = weighted_nats(logits[part], targets[part], weights[part])
            detail = f"{float(measured):.6g} instead of {float(loss):.6g} nats"
            case = f"{name}, {row.id}"
            yield close(f"loss {layout} = alone", case, measured, loss, tolerance, detail)
        for count in range(1, 1 + min(2, len(rows))):
            total = step_loss(model, NextToken(model), batch, count)
            case = f"{name}, {layout}, {count} micro-batches"
            yield close("loss of a step = sum of examples", case, total, expected, tolerance)


def step_loss(model: LLM, objective: Objective, batch: Batch, count: int = 1) -> Tensor:
    """Return the loss of a step in `count` micro-batches, as the trainer computes it."""
    units = objective.units(batch)
    losses = [
        objective.loss(model(replace(micro.inputs(), logits="none")), micro, units)["loss"]
        for micro in batch.micro_batches(count)
    ]
    return torch.stack(losses).sum()


def weighted_nats(logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor) -> Tensor:
    """Return the weighted sum of the cross-entropy of the targets, in nats."""
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    nats_T = F.cross_entropy(logits_TV.to(wide), targets_T, reduction="none")
    return (nats_T * weights_T).sum()
