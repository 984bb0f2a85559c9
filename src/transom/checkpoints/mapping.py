"""Foreign tensors to ours and back, by the rows of `names.py`, with every key consumed exactly once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from transom.args import ModelArgs
from transom.errors import RequestError, notice
from transom.names import PREFIXES, UNREAD, Move
from transom.transforms import Shape, to_other, to_own

# What torch says of a tensor that cannot be cut or stacked the way a row wants.
_MISFITS = (RuntimeError, ValueError, IndexError)


def clean(table: str, source: Mapping[str, Tensor], args: ModelArgs, where: str) -> dict[str, Tensor]:
    """A foreign state under the names of its table, without what is known and not read, which is said."""
    out: dict[str, Tensor] = {}
    skipped: dict[str, int] = {}
    patterns = [(p.replace("{n}", str(args.n_layers)), why) for p, why in (*UNREAD[""], *UNREAD.get(table, ()))]
    for key, tensor in source.items():
        old, new = next((pair for pair in PREFIXES.get(table, ()) if key.startswith(pair[0])), ("", ""))
        name = new + key[len(old) :]
        reason = next((why for pattern, why in patterns if re.fullmatch(pattern, name)), None)
        if reason is None:
            out[name] = tensor
        else:
            skipped[reason] = skipped.get(reason, 0) + 1
    for reason, count in skipped.items():
        notice(f"{where}: {count} tensors left unread: {reason}")
    return _untied(out, args, where)


def _untied(source: dict[str, Tensor], args: ModelArgs, where: str) -> dict[str, Tensor]:
    """Without the copy of the embeddings that files of tied models may keep; another matrix is a `RequestError`."""
    heads = [key for key in source if key.endswith("lm_head.weight")] if args.tie_embeddings else []
    for head in heads:
        embeddings = next((t for key, t in source.items() if key.endswith("model.embed_tokens.weight")), None)
        if embeddings is None or not torch.equal(source[head], embeddings):
            raise RequestError(f"{where}: {head} differs from the embeddings, but tie_word_embeddings is true")
    return {key: tensor for key, tensor in source.items() if key not in heads}


def to_ours(
    moves: Iterable[Move], source: Mapping[str, Tensor], shapes: Mapping[str, Shape], where: str
) -> dict[str, Tensor]:
    """Our state, of the given shapes, from a foreign one; keys that do not add up are a `RequestError`."""
    out: dict[str, Tensor] = {}
    used: set[str] = set()
    missing: list[str] = []
    for move in moves:
        absent = [key for key in move.foreign if key not in source]
        missing += absent
        if absent:
            continue
        used.update(move.foreign)
        tensors = [source[key] for key in move.foreign]
        try:
            made = to_own(move.transform, tensors, [shapes[name] for name in move.ours])
        except _MISFITS:
            found = ", ".join(sorted({str(tuple(tensor.shape)) for tensor in tensors}))
            wanted = ", ".join(f"{name} {shapes[name]}" for name in move.ours)
            raise RequestError(
                f"{where}: {move.foreign[0]} has shape {found}, which does not make {wanted}"
            ) from None
        out.update(zip(move.ours, made, strict=True))
    left_over = sorted(set(source) - used)
    unfilled = sorted(set(shapes) - set(out)) if not missing else []
    account(where, missing, left_over, unfilled)
    return out


def to_foreign(moves: Iterable[Move], ours: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The foreign state of ours; one of our parameters that no row writes is a `RequestError`."""
    out: dict[str, Tensor] = {}
    written: set[str] = set()
    for move in moves:
        written.update(move.ours)
        out.update(zip(move.foreign, to_other(move.transform, [ours[name] for name in move.ours]), strict=True))
    account(where, [], [], sorted(set(ours) - written))
    return out


def account(where: str, missing: list[str], left_over: list[str], unfilled: list[str]) -> None:
    """Raise one sentence that lists what does not add up."""
    problems = [
        f"{what} {_few(names)}"
        for what, names in (("missing", missing), ("left over", left_over), ("nothing for", unfilled))
        if names
    ]
    if problems:
        raise RequestError(f"{where}: keys do not add up: {'; '.join(problems)}")


def _few(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
