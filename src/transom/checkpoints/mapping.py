"""Foreign tensors to ours and back, by the names of `checkpoints.families`, with every key consumed
exactly once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from transom.base.errors import RequestError, notice
from transom.checkpoints.families.registry import WEIGHT_NAMES
from transom.checkpoints.files.lazy_tensors import LazyTensor, LazyTensors, TensorGroup
from transom.config.model_args import ModelArgs
from transom.names.tables import KeyMapping
from transom.names.transforms import Shape, apply_transform, invert_transform

# What torch says of a tensor that cannot be cut or stacked the way a row wants.
_MISFITS = (RuntimeError, ValueError, IndexError)
_HEAD, _EMBEDDINGS = (
    r"lm_head\.weight$|^output\.weight$",
    r"model\.embed_tokens\.weight$|^tok_embeddings\.weight$",
)


def clean(table: str, source: LazyTensors, args: ModelArgs, where: str) -> dict[str, LazyTensor]:
    """A foreign source under the names of its table, without what is known and not read, which is
    said.
    """
    out: dict[str, LazyTensor] = {}
    skipped: dict[str, int] = {}
    names = WEIGHT_NAMES[table]
    for key, stored in source.items():
        name = names.known_key(key)
        reason = names.unread_reason(name, args.n_layers)
        if reason is None:
            out[name] = stored
        else:
            skipped[reason] = skipped.get(reason, 0) + 1
    for reason, count in skipped.items():
        notice(f"{where}: {count} tensors left unread: {reason}")
    return _untied(out, args, where)


def _untied(source: dict[str, LazyTensor], args: ModelArgs, where: str) -> dict[str, LazyTensor]:
    """Without the copy of the embeddings that files of tied models may keep; another matrix is a
    `RequestError`.
    """
    heads = [key for key in source if re.search(_HEAD, key)] if args.tie_embeddings else []
    for head in heads:
        embeddings = next(
            (stored for key, stored in source.items() if re.search(_EMBEDDINGS, key)), None
        )
        if embeddings is None or not torch.equal(source[head].read(), embeddings.read()):
            raise RequestError(
                f"{where}: {head} differs from the embeddings, but tie_word_embeddings is true"
            )
    return {key: stored for key, stored in source.items() if key not in heads}


def to_ours(
    mappings: Iterable[KeyMapping], source: LazyTensors, shapes: Mapping[str, Shape], where: str
) -> dict[str, LazyTensor]:
    """Our tensors, of the given shapes, from foreign ones; keys that do not add up are a
    `RequestError`.

    Where several mappings make the same parameter, the first whose keys are there counts; of a
    parameter that none makes, those of the first are missing.
    """
    out: dict[str, LazyTensor] = {}
    used: set[str] = set()
    wanted: dict[str, Sequence[str]] = {}  # our name -> the keys it should have come from
    misfits: list[str] = []
    for mapping in mappings:
        absent = [key for key in mapping.foreign if key not in source]
        if absent or any(name in out for name in mapping.ours):
            for name in mapping.ours:
                wanted.setdefault(name, absent)
            continue
        used.update(mapping.foreign)
        parts = [source[key] for key in mapping.foreign]
        made = _make(mapping, parts, [shapes[name] for name in mapping.ours])
        if made is None:
            found = ", ".join(sorted({str(part.shape) for part in parts}))
            needed = ", ".join(f"{name} {shapes[name]}" for name in mapping.ours)
            misfits.append(f"{mapping.foreign[0]} has shape {found}, which does not make {needed}")
            made = [
                LazyTensor.of(torch.empty(shapes[name], device="meta")) for name in mapping.ours
            ]
        out.update(zip(mapping.ours, made, strict=True))
    unfilled = [name for name in shapes if name not in out]
    missing = list(dict.fromkeys(key for name in unfilled for key in wanted.get(name, ())))
    homeless = [name for name in unfilled if name not in wanted]
    account(where, missing, sorted(set(source) - used), homeless, misfits)
    return out


def _make(
    mapping: KeyMapping, parts: Sequence[LazyTensor], shapes: Sequence[Shape]
) -> list[LazyTensor] | None:
    """What a mapping makes, tried on outlines; None when that has other shapes."""
    try:
        outlines = apply_transform(mapping.transform, [part.meta for part in parts], shapes)
    except _MISFITS:
        return None
    if [tuple(outline.shape) for outline in outlines] != [tuple(shape) for shape in shapes]:
        return None

    def maker(index: int) -> Callable[[], Tensor]:
        return lambda: apply_transform(mapping.transform, [part.read() for part in parts], shapes)[
            index
        ]

    return [
        LazyTensor(tuple(line.shape), line.dtype, maker(index))
        for index, line in enumerate(outlines)
    ]


def to_foreign(mappings: Iterable[KeyMapping], ours: LazyTensors, where: str) -> list[TensorGroup]:
    """What is to be written for ours, one batch per row; a parameter that no row writes is a
    `RequestError`.
    """
    out: list[TensorGroup] = []
    written: set[str] = set()
    for mapping in mappings:
        written.update(mapping.ours)
        outlines = invert_transform(mapping.transform, [ours[name].meta for name in mapping.ours])
        out.append(TensorGroup(mapping.foreign, outlines, _writer(mapping, ours)))
    account(where, [], [], sorted(set(ours) - written), [])
    return out


def _writer(mapping: KeyMapping, ours: LazyTensors) -> Callable[[], list[Tensor]]:
    return lambda: invert_transform(mapping.transform, [ours[name].read() for name in mapping.ours])


def account(
    where: str, missing: list[str], left_over: list[str], unfilled: list[str], misfits: list[str]
) -> None:
    """Raise one sentence that lists what does not add up."""
    problems = [
        f"{what}{_few(names)}"
        for what, names in (
            ("missing ", missing),
            ("left over ", left_over),
            ("nothing for ", unfilled),
            ("", misfits),
        )
        if names
    ]
    if problems:
        raise RequestError(f"{where}: keys do not add up: {'; '.join(problems)}")


def _few(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
