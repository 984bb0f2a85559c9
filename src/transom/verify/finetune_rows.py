"""Rows of fine-tuning: loss on what the assistant says and nowhere else, the same loss however a
row lies.

Answers are found a second time here, in the text that a template writes, and not in tokens: nothing
of `data/chat/turns.py` takes part.
"""

from __future__ import annotations

import json
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.errors import notice
from transom.chat.files import FILE
from transom.chat.template import ChatTemplate
from transom.data.batch import NO_TARGET, Batch
from transom.data.chat.batches import packed_batch, padded_batch
from transom.data.chat.conversations import ChatExample, recognise
from transom.data.chat.finetune_sets import Problem
from transom.data.chat.messages import Message
from transom.data.chat.rows import ChatEncoder, EncodedChats
from transom.data.chat.turns import EncodedChat
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import train_bpe
from transom.training.losses.cross_entropy import head_loss
from transom.training.losses.objectives import NextToken
from transom.verify.findings import TOLERANCES, Finding, difference

Said = tuple[str, float]  # the text of an answer, and its weight
Answers = Sequence[Said | None]

BATCH = 16  # rows that are looked at together
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
CONTROL = (
    *(
        BEGIN,
        END,
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
)
VOCABULARY = (
    256 + len(CONTROL) + 40
)  # bytes, control tokens, and pairs that may grow across the edges of turns
# What each template puts before and behind the words of an answer for the model to say.
FRAMES = {
    "chatml": ("", "<|im_end|>"),
    "llama3": ("", "<|eot_id|>"),
    "mistral-v3": (" ", END),
    "mistral-v3-tekken": ("", END),
    "gemma": ("", "<end_of_turn>"),
    "plain": ("", END),
    "of the folder": ("", END),
}
# As Zephyr's with the blocks that TRL asks for; they leave the end of the turn out.
OWN_TEMPLATE = """\
{%- for message in messages %}{{ '<|' + message.role + '|>\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{%- else %}{{ message.content }}{% endif %}{{ eos_token + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""


def _talk(
    *contents: str, system: str | None = None, weights: Mapping[int, float] | None = None
) -> dict[str, Any]:
    """A row of messages, question and answer by turns; `weights` are those of answers, counted from
    0.
    """
    turns: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for at, content in enumerate(contents):
        turns.append({"role": ("user", "assistant")[at % 2], "content": content})
        if at % 2 and weights and at // 2 in weights:
            turns[-1]["weight"] = weights[at // 2]
    return {"messages": turns}


TALKS = (
    _talk("Capital of Peru?", "It is Lima.", "And of Chile?", "Santiago.", system="Be brief."),
    _talk("Say one.", "One it is.", "Say two.", "Two, then.", "Three?", "3!", weights={0: 0.0}),
    _talk("Half of it?", "A half.", "The rest?", "The other half.", weights={0: 0.5}),
    _talk(
        "What is <|im_end|> or </s>?",
        "The word <|im_end|> and <end_of_turn>, spelled.\n\nThat is all.",
    ),
    _talk("Grüße, 世界?", "Привет 👋"),
    {"prompt": "Two and two", "completion": "make four."},
)
PAIRS = (
    {"prompt": "Capital of Italy?", "chosen": "Rome.", "rejected": "It is Oslo, I think."},
    {"prompt": "Two and three", "chosen": "make five.", "rejected": "make six."},
)


def examples_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[ChatExample]:
    """Rows as a file would give them."""
    return [recognise(row).example(row, f"{name} {at}") for at, row in enumerate(rows)]


@dataclass(frozen=True)
class Writer:
    """What makes rows of examples; `frame` is what stands around the words of an answer, where that
    is known.
    """

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    seq_len: int
    frame: tuple[str, str] | None = None

    def encode(
        self, examples: Sequence[ChatExample], problems: list[Problem] | None = None
    ) -> EncodedChats:
        """Rows as they are trained on; longer ones are left out."""
        encoder = ChatEncoder(self.tokenizer, self.template, self.seq_len, truncate="drop")
        return encoder.encode(examples, problems)


def built_in_writers() -> list[Writer]:
    """One tokenizer whose padding is its EOS, with every built-in kind of template and one of a
    folder.
    """
    with tempfile.TemporaryDirectory(prefix="transom-verify-") as scratch:
        folder = Path(scratch)
        text = json.dumps([TALKS, PAIRS], ensure_ascii=False)
        train_bpe([text], VOCABULARY, CONTROL).save(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({**config, "pad_token": END}), encoding="utf-8"
        )
        (folder / FILE).write_text(OWN_TEMPLATE, encoding="utf-8")
        tokenizer = Tokenizer.load(folder)
        names = {name: None if name == "of the folder" else name for name in FRAMES}
        templates = {
            name: ChatTemplate.load(folder, tokenizer, which) for name, which in names.items()
        }
    return [
        *(
            Writer(f"template {name}", tokenizer, found, 512, FRAMES[name])
            for name, found in templates.items()
        ),
        Writer("no template", tokenizer, None, 512, ("", END)),
    ]


# -- what carries loss
# ------------------------------------------------------------------------------------


def compare_masks(examples: Sequence[ChatExample], writer: Writer) -> Iterator[Finding]:
    """For every example, packed and padded: the words with loss and their weights are those of its
    answers.

    What cannot be compared is counted and said: rows that are no conversations or that the template
    refuses, rows too long, answers that it writes otherwise than it asks for them.
    """
    told = [one for one in examples if one.kind not in ("text", "answer")]
    problems: list[Problem] = []
    written = {one.id: writer.encode([one], problems) for one in told}
    refused = {problem.where for problem in problems}
    long = {id for id, encoded in written.items() if encoded.counts.dropped}
    expected = {one.id: answers_of(one, writer) for one in told if one.id not in refused}
    unlike = {id for id, answers in expected.items() if None in answers}
    for count, what in (
        (len(examples) - len(told), "are no conversations"),
        (len(problems), f"cannot be written ({problems[0].sentence})" if problems else ""),
        (len(long), "are too long"),
        (len(unlike), "have answers that are written otherwise than they are asked for"),
    ):
        if count:
            notice(f"{writer.name}: not compared: {count} examples {what}")
    compared = [one for one in told if one.id in expected and one.id not in long | unlike]
    wrong = [one.id for one in compared if bool(written[one.id].items) != bool(expected[one.id])]
    detail = f"not so for {wrong[0]}" if wrong else ""
    yield Finding(
        "examples without loss have no answer", writer.name, float(len(wrong)), 0.0, detail
    )
    if writer.frame is not None:
        yield from _as_by_hand(compared, expected, writer)
    kept = [one for one in compared if written[one.id].items]
    for at in range(0, len(kept), BATCH):
        group = kept[at : at + BATCH]
        yield from _compare_group(group, [written[one.id] for one in group], expected, writer)


def _compare_group(
    examples: Sequence[ChatExample],
    parts: Sequence[EncodedChats],
    expected: Mapping[str, Answers],
    writer: Writer,
) -> Iterator[Finding]:
    """The rows of a few examples in one batch of every layout."""
    labels = [label for part in parts for label in part.labels or []]
    encoded = EncodedChats([item for part in parts for item in part.items], labels=labels or None)
    for layout, batch in layouts(encoded):
        found: dict[str, Counter[Said]] = {}
        rows = (row for item in encoded.items for row in item)
        for row, said in zip(rows, said_in(batch, writer.tokenizer), strict=True):
            found.setdefault(row.id, Counter()).update(said)
        for example in examples:
            words, where = found[example.id], f"{writer.name}, {example.id}"
            yield _same_words(
                f"loss on answers alone, {layout}", where, words, expected[example.id]
            )
            if calls := _calls_in(example):
                lost = [name for name in calls if not any(name in text for text, _ in words)]
                detail = f"nothing of the call of {lost[0]} carries loss" if lost else ""
                yield Finding(
                    f"calls of tools are learnt, {layout}", where, float(len(lost)), 0.0, detail
                )


def _calls_in(example: ChatExample) -> list[str]:
    """Names of all tools that are called where it counts."""
    return [name for messages, _ in _said_messages(example) for name in _calls(messages[-1])]


def _same_words(comparison: str, where: str, found: Counter[Said], answers: Answers) -> Finding:
    expected = Counter(one for one in answers if one is not None)
    more, less = found - expected, expected - found
    detail = f"has loss on {dict(more)}, expected on {dict(less)}" if more or less else ""
    return Finding(comparison, where, float((more | less).total()), 0.0, detail)


def _as_by_hand(
    examples: Sequence[ChatExample], expected: Mapping[str, Answers], writer: Writer
) -> Iterator[Finding]:
    """The other way to find answers agrees with contents and ends that are known."""
    assert writer.frame is not None, "asked for templates that are known"
    before, behind = writer.frame
    for example in examples:
        words = Counter(
            (f"{before}{said[-1]['content']}{behind}", weight)
            for said, weight in _said_messages(example)
        )
        yield _same_words(
            "answers = by hand", f"{writer.name}, {example.id}", words, expected[example.id]
        )


def answers_of(example: ChatExample, writer: Writer) -> Answers:
    """(text to say, weight) of every answer that counts; None for one that is written otherwise
    than asked for.
    """
    found: list[Said | None] = []
    for messages, weight in _said_messages(example):
        if writer.template is None:
            end = writer.tokenizer.eos_id
            ending = "" if end is None else writer.tokenizer.id_to_token(end)
            text: str | None = f"{messages[-1]['content']}{ending}"
        else:
            text = _said(writer.template, messages, example.tools)
        found.append(None if text is None else (_plain(text, writer.tokenizer), weight))
    return found


def _said_messages(example: ChatExample) -> Iterator[tuple[tuple[Message, ...], float]]:
    """Conversations that end with an answer that counts, and its weight."""
    compared = example.kind in ("pair", "label")  # of which the answers alone are learnt
    for answer in example.answers or ((),):
        talk = example.messages + answer
        for at, message in enumerate(talk):
            weight = message.get("weight", 1.0) * example.weight
            if (
                message["role"] == "assistant"
                and weight > 0
                and (at >= len(example.messages) or not compared)
            ):
                yield talk[: at + 1], weight


def _said(template: ChatTemplate, messages: Sequence[Message], tools: Any) -> str | None:
    """What stands behind the prompt for the last message, through the first control token behind
    its words.

    Calls of tools may hold control tokens themselves: they end with the last one, where the
    template writes them.
    """
    plain = [
        {key: value for key, value in message.items() if key != "weight"} for message in messages
    ]
    asked = template.render(plain[:-1], tools) if len(plain) > 1 else None
    whole = template.render(plain, tools, add_generation_prompt=False)
    if asked is None or not whole.startswith(asked):
        return None
    text, content = whole[len(asked) :], plain[-1].get("content")
    calls = [name for name in _calls(plain[-1]) if name in text]
    words = content.strip() if isinstance(content, str) and not calls else ""
    behind = text.rfind(words) + len(words) if words in text and words else 0
    control = (
        "|".join(map(re.escape, sorted(template.tokenizer.special_tokens, key=len, reverse=True)))
        or "(?!)"
    )
    ends = [match.end() for match in re.finditer(control, text[behind:])]
    if not ends:
        return None
    return text[: behind + (ends[-1] if calls else ends[0])]


def _calls(message: Mapping[str, Any]) -> list[str]:
    """Names of the tools that a message calls."""
    return [call["function"]["name"] for call in message.get("tool_calls", ())]


def said_in(batch: Batch, tokenizer: Tokenizer) -> Iterator[list[Said]]:
    """(text, weight) of every run of targets of one weight, for each example of a batch."""
    for _, targets_T, weights_T in pieces(batch):
        runs = groupby(
            zip(targets_T.tolist(), weights_T.tolist(), strict=True), key=lambda pair: pair[1]
        )
        yield [
            (_plain(tokenizer.decode([id for id, _ in run], skip_special=False), tokenizer), weight)
            for weight, run in runs
            if weight > 0
        ]


def _plain(text: str, tokenizer: Tokenizer) -> str:
    """What two ways through a vocabulary agree on: composed text, without a space that some put in
    front.
    """
    composed = unicodedata.normalize("NFC", text)
    return composed.lstrip(" ") if tokenizer.raw_byte_ids else composed


def pieces(batch: Batch) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(place, targets [T], their weights [T], 0 where there is none) of each example, as it lies in
    a batch.

    The place is that among the columns of a packed batch, or among the rows of a padded one laid
    end to end.
    """
    weights_BT = (batch.targets != NO_TARGET).float()
    if batch.weights is not None:
        weights_BT = weights_BT * batch.weights
    if batch.sizes is None:
        assert batch.lengths is not None, "rows are packed or padded"
        width = batch.tokens.size(1)
        starts = [(row * width, size) for row, size in enumerate(batch.lengths.tolist())]
    else:
        sizes = list(chain(*batch.sizes))
        starts = [(sum(sizes[:at]), size) for at, size in enumerate(sizes)]
    for start, size in starts:
        place = slice(start, start + size)
        yield place, batch.targets.flatten()[place], weights_BT.flatten()[place]


def layouts(encoded: EncodedChats) -> Iterator[tuple[str, Batch]]:
    """All rows in one batch, padded, and packed where they may be; in their order."""
    if not encoded.items:
        return
    yield "padded", padded_batch(encoded.items, labels=encoded.labels or [])
    if encoded.rows_per_item == 1 and encoded.labels is None:
        rows = [row for (row,) in encoded.items]
        half = -(-len(rows) // 2)
        yield "packed", packed_batch([part for part in (rows[:half], rows[half:]) if part])


# -- one loss per example
# ---------------------------------------------------------------------------------


@torch.no_grad()
def compare_losses(model: LLM, encoded: EncodedChats, name: str) -> Iterator[Finding]:
    """The loss of every example alone against that in a packed and a padded batch, whole and in
    micro-batches.
    """
    rows = [row for item in encoded.items for row in item]
    device = model.device
    alone = [_alone(model, row) for row in rows]
    tolerance = TOLERANCES[alone[0].dtype]
    for layout, made in layouts(encoded):
        batch = made.to(device)
        hidden_BTD = model(replace(batch.inputs(), logits="none")).hidden_BTD
        for row, loss, (place, targets_T, weights_T) in zip(
            rows, alone, pieces(batch), strict=True
        ):
            here = head_loss(model, hidden_BTD.flatten(0, 1)[place], targets_T, None, weights_T)
            error = difference(here, loss)
            detail = (
                "" if error <= tolerance else f"{float(here):.6g} instead of {float(loss):.6g} nats"
            )
            yield Finding(f"{layout} = alone", f"{name}, {row.id}", error, tolerance, detail)
        objective = NextToken(model)
        units = objective.units(batch)
        expected = torch.stack(alone).sum() / sum(float(row.weights[1:].sum()) for row in rows)
        for count in range(1, 1 + min(2, len(rows))):
            parts = [
                objective.loss(model(replace(micro.inputs(), logits="none")), micro, units)["loss"]
                for micro in batch.micro_batches(count)
            ]
            error = difference(torch.stack(parts).sum(), expected)
            where = f"{name}, {layout}, {count} micro-batches"
            yield Finding(
                "loss of a step = its examples'",
                where,
                error,
                tolerance,
                "another sum" if error else "",
            )


def _alone(model: LLM, row: EncodedChat) -> Tensor:
    """Weighted nats of one row, by itself."""
    device = model.device
    ids_T, weights_T = (torch.as_tensor(one, device=device) for one in (row.ids, row.weights))
    logits = model(TransformerInput(ids_T[None, :-1].long())).logits
    assert logits is not None, "all logits are the default"
    nats_T = F.cross_entropy(
        logits[0].to(torch.promote_types(logits.dtype, torch.float32)),
        ids_T[1:].long(),
        reduction="none",
    )
    return (nats_T * weights_T[1:]).sum()
