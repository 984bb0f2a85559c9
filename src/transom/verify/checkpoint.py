"""A model folder of any format: every key has its place, and every way to read and write it gives
the same numbers.

What the files hold is read a second time here, by rules of its own that share nothing with
`checkpoints.families`; where `transformers` is installed, its logits and greedy tokens are compared
too.
"""

from __future__ import annotations

import importlib
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from transom.base.errors import RequestError, notice, require
from transom.base.files import read_json
from transom.base.runtime import DTYPES
from transom.chat import built_in
from transom.chat.files import FILE
from transom.checkpoints.convert import convert
from transom.checkpoints.files.layout import CONFIG, Format
from transom.checkpoints.files.lazy_tensors import LazyTensor, LazyTensors
from transom.checkpoints.files.location import find_model
from transom.checkpoints.load import load
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import save
from transom.checkpoints.state import open_parameters
from transom.config.layer_args import RopeLayout
from transom.config.model_args import ModelArgs
from transom.inference.loop import generate
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.tokenizers.training import byte_tokenizer
from transom.verify.cache import REAL_SLACK, compare_full_size
from transom.verify.cache import run as forward
from transom.verify.file_tensors import (
    Case,
    accounted,
    by_hand,
    layout,
    open_case,
    stored_twice,
)
from transom.verify.findings import TOLERANCES, Finding, difference, one_line, same_bytes
from transom.verify.sample_models import BASE, SAMPLES, WINDOW, random_tokens, sample_model
from transom.verify.texts import compare_texts
from transom.verify.tiny_runs import quiet

LENGTH, PROMPT, GREEDY = 40, 5, 16  # tokens: compared at least, continued, and how far
LONGEST = 512  # tokens; spans beyond half of this are crossed where --length asks for it
SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>"),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
_BYTES = {**BASE, "vocab_size": 256 + len(SPECIAL), "head_dim": 6, "max_seq_len": 96}
# Written on the spot, as (format, fields): rotary layouts, biases, tying, windows, chunks, two
# kinds of experts.
FOLDERS: dict[str, tuple[Format, dict[str, Any]]] = {
    "qwen2": ("hf", {**_BYTES, "rope_layout": "halves", "qkv_bias": True, "tie_embeddings": True}),
    "llama": ("meta", {**_BYTES, "use_scaled_rope": True}),
    "mistral": ("mistral", {**_BYTES, "sliding_window": WINDOW}),
    "mixtral": ("hf", {**SAMPLES["mixtral"], **_BYTES}),
    "llama4": ("hf", {**SAMPLES["llama4"], **_BYTES, "n_layers": 4}),
}


@dataclass(frozen=True)
class Numbers:
    """What a model makes of random tokens [1, T]: logits, a greedy continuation, and its two best
    logits' gaps.
    """

    tokens: Tensor
    logits: Tensor
    greedy: list[int]
    gaps: list[float]  # relative to the largest logit, of each greedy token
    tolerance: float


def check(
    model: str | None = None, *, length: int | None = None, dtype: str = "float32"
) -> Iterator[Finding]:
    """Compare a model folder or hub id, or small folders of several families and formats.

    Args:
        model: The folder.
        length: The length of the longest sequence, in tokens.
        dtype: The dtype of the weights, except where bytes are compared.
    """
    if model is not None:
        yield from compare_folder(model, length, dtype)
        return
    for name, (kind, fields) in FOLDERS.items():
        with tempfile.TemporaryDirectory(prefix="transom-verify-") as scratch:
            folder = Path(scratch) / name
            tokenizer = byte_tokenizer(SPECIAL)
            save(
                sample_model(ModelArgs.from_dict(fields), dtype=torch.float32),
                folder,
                kind,
                tokenizer,
            )
            template = built_in.named("llama3")
            assert template is not None, "one of the built-in templates"
            (folder / FILE).write_text(template.source(tokenizer), encoding="utf-8")
            yield from _quietly(compare_folder(folder, name=name))


def _quietly(findings: Iterator[Finding]) -> Iterator[Finding]:
    while True:
        with quiet():
            found = next(findings, None)
        if found is None:
            return
        yield found


def _compare_merged(
    folder: str | Path, length: int | None, dtype: str, called: str
) -> Iterator[Finding]:
    """An adapter folder or a run of adapters, as the model that it and its base are together."""
    notice(
        f"{called}: an adapter; what is compared is the model that it and its base are together, "
        f"merged"
    )
    with tempfile.TemporaryDirectory(prefix="transom-verify-") as scratch:
        with quiet():
            convert(folder, Path(scratch) / "merged", "native")
        yield from compare_folder(Path(scratch) / "merged", length, dtype, called)


def compare_folder(
    folder: str | Path, length: int | None = None, dtype: str = "float32", name: str | None = None
) -> Iterator[Finding]:
    """All comparisons for a model folder or hub id; weights in `dtype`, except where bytes are
    compared.
    """
    require(dtype in DTYPES, "--dtype", dtype, f"expected {', '.join(DTYPES)}")
    found = find_model(folder)
    called = str(folder) if name is None else name
    if found.adapter is not None:
        yield from _compare_merged(folder, length, dtype, called)
        return
    where = found.model
    args = read_args(where)
    longest = args.max_seq_len
    require(
        length is None or 2 <= length <= longest,
        "--length",
        length,
        f"expected 2 to max_seq_len = {longest}",
    )
    for find in (
        stored_twice,
        accounted,
    ):  # a folder that fails these cannot be loaded, so nothing else is compared
        first = list(find(case := open_case(where, called, args, whole=find is stored_twice)))
        yield from first
        if not all(one.ok for one in first):
            return
    with quiet():  # it has been said what is left unread
        ours = open_parameters(where, args)
    yield from by_hand(case, ours)
    yield from layout(case)
    yield from compare_texts(where, called)
    yield from _numbers(case, ours, dtype, length)


def _numbers(case: Case, ours: LazyTensors, dtype: str, length: int | None) -> Iterator[Finding]:
    """What takes a model: one at a time is in memory."""
    if case.args.head is not None:
        notice(
            f"{case.name}: has a head instead of next-token logits; keys and bytes are compared, "
            f"no logits"
        )
        yield from _round_trips(case, ours, None, dtype)
        return
    with quiet():
        model = load(case.folder, dtype=dtype)
    numbers = _numbers_of(model, length)
    bad = int((~numbers.logits.isfinite()).sum())
    detail = (
        f"{bad} of {numbers.logits.numel()} are NaN or infinite, and equal to nothing"
        if bad
        else ""
    )
    yield Finding("logits are finite", case.name, float(bad), 0.0, detail)
    if bad:
        yield from _round_trips(case, ours, None, dtype)
        return
    yield from _tying(case, model, numbers)
    del model
    yield from _round_trips(case, ours, numbers, dtype)
    yield from _transformers(case, numbers, dtype)
    with quiet():
        model = load(case.folder, dtype=dtype)
    yield from compare_full_size(model, case.name, _length(case.args) if length is None else length)


def _length(args: ModelArgs) -> int:
    """Tokens that cross every window and chunk twice, as far as that does not take minutes."""
    spans = [layer.rule.size for layer in args.layers if 2 * layer.rule.size <= LONGEST]
    return min(args.max_seq_len, max(LENGTH, 2 * (max(spans, default=0) + REAL_SLACK) + 3))


# -- numbers
# ----------------------------------------------------------------------------------------------


def _numbers_of(model: LLM, length: int | None) -> Numbers:
    args, scaling = model.args, model.args.scaling
    count = _length(args) if length is None else length
    tokens = random_tokens(args, 1, min(count, args.max_seq_len))
    logits = _logits(model, tokens)
    room = args.max_seq_len
    if (
        scaling is not None and scaling.by_length
    ):  # others choose frequencies anew for every token behind this
        room = min(room, scaling.original_max_seq_len)
    steps = max(0, min(GREEDY, room - PROMPT))
    causal = args.context_dim is None and all(layer.rule.kind != "full" for layer in args.layers)
    if not (steps and causal and bool(logits.isfinite().all())):
        return Numbers(tokens, logits, [], [], TOLERANCES[logits.dtype])
    greedy = generate(model, tokens[:, :PROMPT], max_new_tokens=steps)
    best = _logits(model, greedy[:, :-1])[0, PROMPT - 1 :].topk(2).values
    gaps = ((best[:, 0] - best[:, 1]) / logits.abs().max()).tolist()
    return Numbers(tokens, logits, greedy[0].tolist(), gaps, TOLERANCES[logits.dtype])


def _logits(model: LLM, tokens: Tensor) -> Tensor:
    return forward(model, [TransformerInput(tokens)])[-1]


@torch.no_grad()
def _tying(case: Case, model: LLM, numbers: Numbers) -> Iterator[Finding]:
    """A changed embedding changes the logit of its token where the output is tied, and only
    there.
    """
    prompt = numbers.tokens[:, :PROMPT]
    token = next(id for id in range(case.args.vocab_size) if id not in prompt)
    before, row = _logits(model, prompt), model.tok_embeddings.weight[token]
    kept = row.clone()
    row.add_(1.0)
    tied = not torch.equal(_logits(model, prompt)[..., token], before[..., token])
    row.copy_(kept)
    said = case.args.tie_embeddings
    detail = "" if tied == said else f"the config says {said}, the model does {tied}"
    yield Finding("output tied as the config says", case.name, float(tied != said), 0.0, detail)


def _round_trips(
    case: Case, ours: LazyTensors, numbers: Numbers | None, dtype: str
) -> Iterator[Finding]:
    """Written in every format that holds the model and read back: the same bits, and the same
    logits.
    """
    for format in get_args(Format):
        with tempfile.TemporaryDirectory(prefix="transom-verify-") as scratch:
            out = Path(scratch) / format
            try:
                with quiet():
                    convert(case.folder, out, format)
            except RequestError as error:
                notice(f"{case.name}: not written as {format}: {error}")
                continue
            where = f"{case.name} as {format}"
            try:
                with quiet():
                    args = read_args(out)
                    again = open_parameters(out, args)
            except RequestError as error:
                yield Finding("written and read back", where, math.inf, 0.0, str(error))
                continue
            yield from _bits(case, ours, args, again, where)
            if numbers is not None:
                with quiet():
                    logits = _logits(load(out, dtype=dtype), numbers.tokens)
                error_of = difference(logits, numbers.logits)
                detail = (
                    "" if error_of <= numbers.tolerance else "the bits agree, the config does not"
                )
                yield Finding(
                    "logits of what was written", where, error_of, numbers.tolerance, detail
                )


def _bits(
    case: Case, ours: LazyTensors, args: ModelArgs, again: LazyTensors, where: str
) -> Iterator[Finding]:
    """Every tensor, in its new order where the other layout orders rows otherwise."""
    expected: dict[str, LazyTensor] = dict(ours)
    if case.args.tie_embeddings and not args.tie_embeddings:
        expected["output.weight"] = ours["tok_embeddings.weight"]
    for name in sorted(expected.keys() | again.keys()):
        if name not in expected or name not in again:
            detail = f"{name} is {'lost' if name in expected else 'new'}"
            yield Finding("written and read back", f"{where}, {name}", math.inf, 0.0, detail)
            continue
        old, new = expected[name].read(), again[name].read()
        rows = _order(name, old, case.args, args.rope_layout)
        same = same_bytes(new, old if rows is None else old[rows])
        detail = "" if same else "other bits"
        yield Finding(
            "written and read back", f"{where}, {name}", 0.0 if same else math.inf, 0.0, detail
        )


def _order(name: str, tensor: Tensor, args: ModelArgs, to: RopeLayout) -> list[int] | None:
    """Where each row of a query or key projection comes from when pairs (0, 1), (2, 3) become (0,
    d/2), ...
    """
    turns = re.fullmatch(r"layers\.\d+\.attention\.(wq|wk|q_norm|k_norm)\.(weight|bias)", name)
    if to == args.rope_layout or turns is None:
        return None
    half, out = args.rotary_dim // 2, []
    for row in range(tensor.size(0)):
        head, at = row - row % args.head_size, row % args.head_size
        if at < 2 * half:
            at = 2 * (at % half) + at // half if to == "halves" else half * (at % 2) + at // 2
        out.append(head + at)
    return out


# -- transformers
# -----------------------------------------------------------------------------------------


def _transformers(case: Case, numbers: Numbers, dtype: str) -> Iterator[Finding]:
    """Their logits and greedy tokens, for a folder that they read or that can be written so that
    they do.
    """
    if find_spec("transformers") is None:
        notice("transformers is not installed: nothing is compared with it")
        return
    with tempfile.TemporaryDirectory(prefix="transom-verify-") as scratch:
        folder = case.folder
        if case.kind != "hf":
            folder = Path(scratch) / "hf"
            try:
                with quiet():
                    convert(case.folder, folder, "hf")
            except RequestError:
                notice(f"{case.name}: not a folder of transformers, and cannot be written as one")
                return
        try:
            with quiet():
                theirs, missing = _their_model(folder, dtype)
        except Exception as error:  # whatever another library raises
            said = f"transformers cannot load it ({one_line(error)})"
            if case.kind == "hf":
                notice(f"{case.name}: {said}")
            else:  # what was written here must be readable there
                yield Finding("loads in transformers", case.name, math.inf, 0.0, said)
            return
        detail = f"not found there: {', '.join(missing[:5])}" if missing else ""
        yield Finding("loads in transformers", case.name, float(len(missing)), 0.0, detail)
        try:
            with quiet():
                expected = _their_logits(theirs, numbers.tokens)
        except (
            Exception
        ) as error:  # a release may fail in its own forward, as 5.24.0 does on Llama 4 with images
            notice(
                f"{case.name}: no logits are compared: transformers cannot run the model "
                f"({one_line(error)})"
            )
            return
        yield from _their_numbers(case, theirs, numbers, expected)


def _their_model(folder: Path, dtype: str) -> tuple[Any, list[str]]:
    """The model as transformers builds it, without code from the folder, and the weights that it
    did not find.
    """
    transformers: Any = importlib.import_module("transformers")
    named = str((read_json(folder / CONFIG).get("architectures") or ["AutoModelForCausalLM"])[0])
    known = re.fullmatch(r"\w+For(CausalLM|ConditionalGeneration)", named)
    kind = getattr(transformers, named, None) if known else None
    theirs, info = (kind or transformers.AutoModelForCausalLM).from_pretrained(
        folder,
        dtype=DTYPES[dtype],
        attn_implementation="eager",  # their sdpa knows neither soft caps nor sinks
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    return theirs.eval(), sorted(
        str(one) for key in ("missing_keys", "mismatched_keys") for one in info[key]
    )


@torch.no_grad()
def _their_logits(theirs: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = theirs(tokens).logits
    return logits


@torch.no_grad()
def _their_numbers(
    case: Case, theirs: Any, numbers: Numbers, expected: Tensor
) -> Iterator[Finding]:
    """Compare logits and greedy tokens with theirs."""
    error = difference(numbers.logits, expected)
    off = [
        t
        for t in range(expected.size(1))
        if not difference(numbers.logits[:, t], expected[:, t]) <= error / 2
    ]
    detail = f"first at position {off[0]}" if off and not error <= numbers.tolerance else ""
    where = f"{case.name}, {expected.size(1)} tokens"
    yield Finding("logits = transformers", where, error, numbers.tolerance, detail)
    count = len(numbers.greedy) - PROMPT
    if count <= 0:
        return
    given = numbers.tokens[:, :PROMPT]
    for _ in range(
        count
    ):  # by hand: `generate` would take stop tokens, penalties and padding from configs
        with quiet():
            given = torch.cat([given, _their_logits(theirs, given)[:, -1:].argmax(-1)], 1)
    at = next((i for i in range(count) if numbers.greedy[PROMPT + i] != given[0, PROMPT + i]), None)
    if at is not None and numbers.gaps[at] <= numbers.tolerance:
        notice(
            f"{case.name}: the two best logits of greedy token {at} are nearly equal; compared "
            f"up to there"
        )
        at = None
    detail = "" if at is None else f"first at token {at}"
    yield Finding("greedy tokens = transformers", case.name, float(at is not None), 0.0, detail)
