"""A model folder: its files, its tokenizer, and every way to read, write and run it.

The tensors of the files are read a second time by `verify.file_tensors`. If `transformers` is
installed, its logits are compared too.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from transom.base.errors import RequestError, expect, notice, one_line
from transom.base.files import read_json
from transom.base.runtime import DTYPES
from transom.chat import built_in
from transom.chat.files import FILE
from transom.checkpoints.convert import convert
from transom.checkpoints.files.layout import CONFIG, Format, gguf_files
from transom.checkpoints.files.lazy_tensors import LazyTensor, LazyTensors
from transom.checkpoints.files.location import find_model
from transom.checkpoints.load import load
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import save
from transom.checkpoints.state import open_parameters
from transom.config.layer_args import RopeLayout
from transom.config.model_args import ModelArgs
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.tokenizers.training import byte_tokenizer
from transom.verify.cache import REAL_SLACK, compare_full_size
from transom.verify.cache import run as forward
from transom.verify.file_tensors import (
    FolderFiles,
    compare_rope_layout,
    compare_tensors,
    open_folder,
)
from transom.verify.findings import (
    TOLERANCES,
    Finding,
    close,
    exact,
    first_difference,
    missing,
    same_bits,
)
from transom.verify.sample_models import BASE, SAMPLES, WINDOW, random_tokens, sample_model
from transom.verify.texts import compare_texts
from transom.verify.tiny_runs import quiet, temporary_folder

LENGTH = 40  # tokens that are compared at least
PROMPT = 5  # tokens that the tied output is compared on
LONGEST = 512  # tokens; only --length compares sequences beyond longer windows and chunks
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", *_HEADERS, "<|eot_id|>")
_BYTES = {**BASE, "vocab_size": 256 + len(SPECIAL), "head_dim": 6, "max_seq_len": 96}
# Format and fields of the folders that are written without a model: both RoPE layouts, biases, a
# tied output, windows, chunks and two kinds of experts.
FOLDERS: dict[str, tuple[Format, dict[str, Any]]] = {
    "qwen2": ("hf", {**_BYTES, "rope_layout": "halves", "qkv_bias": True, "tie_embeddings": True}),
    "llama": ("meta", {**_BYTES, "use_scaled_rope": True}),
    "mistral": ("mistral", {**_BYTES, "sliding_window": WINDOW}),
    "mixtral": ("hf", {**SAMPLES["mixtral"], **_BYTES}),
    "llama4": ("hf", {**SAMPLES["llama4"], **_BYTES, "n_layers": 4}),
}


class Outputs(NamedTuple):
    """Random tokens [1, T], and the logits [1, T, V] of a model with weights of a dtype."""

    tokens: Tensor
    logits: Tensor
    dtype: str


def check(
    model: str | None = None, *, length: int | None = None, dtype: str = "float32"
) -> Iterator[Finding]:
    """Compare a model folder or hub id, or small folders of several families and formats.

    Args:
        model: The folder.
        length: The length of the longest sequence, in tokens.
        dtype: The dtype of the weights, except where bits are compared.
    """
    if model is not None:
        yield from compare_folder(model, length, dtype)
        return
    tokenizer, template = byte_tokenizer(SPECIAL), built_in.named("llama3")
    assert template is not None, "the template is built in"
    for name, (kind, fields) in FOLDERS.items():
        with temporary_folder() as folder, quiet():
            sample = sample_model(ModelArgs.from_dict(fields), dtype=torch.float32)
            save(sample, folder / name, kind, tokenizer)
            (folder / name / FILE).write_text(template.source(tokenizer), encoding="utf-8")
            findings = list(compare_folder(folder / name, name=name))
        yield from findings


def compare_folder(
    folder: str | Path, length: int | None = None, dtype: str = "float32", name: str | None = None
) -> Iterator[Finding]:
    """Make all comparisons of a model folder or hub id; an adapter is merged into its base first.

    Raises:
        RequestError: If there is no model, or if `length` or `dtype` does not fit.
    """
    expect(dtype in DTYPES, "--dtype", dtype, f"one of {', '.join(DTYPES)}")
    location, name = find_model(folder), str(folder) if name is None else name
    if location.adapter is not None:
        notice(f"{name}: an adapter, which is merged into its base and then compared")
        with temporary_folder() as scratch:
            quiet()(convert)(folder, scratch / "merged", "native")
            yield from compare_folder(scratch / "merged", length, dtype, name)
        return
    args = read_args(location.model)
    fits = length is None or 2 <= length <= args.max_seq_len
    expect(fits, "--length", length, f"2 to max_seq_len = {args.max_seq_len}")
    keys = "every key = one parameter"
    try:
        files = open_folder(location.model, name, args)
        # `open_folder` prints the same notices
        parameters = quiet()(open_parameters)(location.model, args)
    except RequestError as error:
        yield missing(keys, name, error)
        return
    yield exact(keys, name, 0)
    yield from compare_tensors(files, parameters)
    yield from compare_rope_layout(files)
    yield from compare_texts(location.model, name)
    outputs = None
    if args.head is not None:
        notice(f"{name}: has a head in place of next-token logits; no logits are compared")
    else:
        model = quiet()(load)(location.model, dtype=dtype, keep_quantized=False)
        length = _default_length(args) if length is None else length
        tokens = random_tokens(args, 1, length)
        logits = _logits(model, tokens)
        bad = int((~logits.isfinite()).sum())
        yield exact("logits are finite", name, bad, f"{bad} of {logits.numel()} are not")
        if not bad:
            outputs = Outputs(tokens, logits, dtype)
            yield _compare_tying(model, args.tie_embeddings, name, tokens[:, :PROMPT])
            yield from compare_full_size(model, name, length)
        del model  # the next comparisons have a model in memory themselves
    yield from _compare_round_trips(files, parameters, outputs)


def _default_length(args: ModelArgs) -> int:
    """Return a length beyond every window and chunk that does not take minutes."""
    spans = [layer.rule.size for layer in args.layers if 2 * layer.rule.size <= LONGEST]
    return min(args.max_seq_len, max(LENGTH, 2 * (max(spans, default=0) + REAL_SLACK) + 3))


def _logits(model: LLM, tokens: Tensor) -> Tensor:
    return forward(model, [TransformerInput(tokens)])[-1]


@torch.no_grad()
def _compare_tying(model: LLM, stated: bool, name: str, prompt: Tensor) -> Finding:
    """Change the embedding of a token: its logit must change if and only if the output is tied.

    `stated` is what the config of the folder says, since the arguments of the model may differ.
    """
    token = next(id for id in range(model.args.vocab_size) if id not in prompt)
    before, row = _logits(model, prompt), model.tok_embeddings.weight[token]
    kept = row.clone()
    row.add_(1.0)
    tied = not torch.equal(_logits(model, prompt)[..., token], before[..., token])
    row.copy_(kept)
    detail = f"the config says {stated}, the model has {tied}"
    return exact("output tied as the config says", name, tied != stated, detail)


# -- round trips


def _compare_round_trips(
    files: FolderFiles, parameters: LazyTensors, outputs: Outputs | None
) -> Iterator[Finding]:
    """Write the model in every format that can express it, and read it back.

    `transformers` loads the folder itself, or the copy in its format.
    """
    for format in get_args(Format):
        with temporary_folder() as scratch:
            folder = scratch / format
            try:
                quiet()(convert)(files.folder, folder, format)
            except RequestError as error:
                notice(f"{files.name}: not written as {format}: {error}")
            else:
                yield from _compare_copy(files, parameters, outputs, folder)
            if format == "hf" and outputs is not None:
                # transformers drops settings of GGUF files, such as rotary scaling.
                own = files.format == "hf" and not gguf_files(files.folder)
                folder = files.folder if own else folder
                yield from _compare_with_transformers(files, outputs, folder)


def _compare_copy(
    files: FolderFiles, parameters: LazyTensors, outputs: Outputs | None, folder: Path
) -> Iterator[Finding]:
    """Compare the bits of every tensor of a copy, and its logits.

    Queries and keys are compared in the row order of the RoPE layout of the copy.
    """
    comparison, case = "written and read back", f"{files.name} as {folder.name}"
    try:
        args = read_args(folder)
        written = quiet()(open_parameters)(folder, args)
    except RequestError as error:
        yield missing(comparison, case, error)
        return
    expected: dict[str, LazyTensor] = dict(parameters)
    if files.args.tie_embeddings and not args.tie_embeddings:
        expected["output.weight"] = parameters["tok_embeddings.weight"]
    for name in sorted(expected.keys() | written.keys()):
        if name not in expected or name not in written:
            state = "lost" if name in expected else "new"
            yield missing(comparison, f"{case}, {name}", f"{name} is {state}")
            continue
        old = _reordered(name, expected[name].read(), files.args, args.rope_layout)
        yield same_bits(comparison, f"{case}, {name}", written[name].read(), old, "other bits")
    if outputs is not None:
        copied = quiet()(load)(folder, dtype=outputs.dtype, keep_quantized=False)
        logits = _logits(copied, outputs.tokens)
        detail = "the weights are equal, the config is not"
        tolerance = TOLERANCES[logits.dtype]
        yield close("logits after a round trip", case, logits, outputs.logits, tolerance, detail)


def _reordered(name: str, tensor: Tensor, args: ModelArgs, to: RopeLayout) -> Tensor:
    """Return a tensor with the rows of query and key projections in the order of the layout `to`.

    The pairs (0, 1), (2, 3) of the interleaved layout are (0, d/2), (1, d/2 + 1) in halves.
    """
    rotates = re.fullmatch(r"layers\.\d+\.attention\.(wq|wk|q_norm|k_norm)\.(weight|bias)", name)
    if to == args.rope_layout or rotates is None:
        return tensor
    heads, half = tensor.unflatten(0, (-1, args.head_size)), args.rotary_dim // 2
    pairs = heads[:, : 2 * half].unflatten(1, (half, 2) if to == "halves" else (2, half))
    rotary = pairs.transpose(1, 2).flatten(1, 2)
    return torch.cat([rotary, heads[:, 2 * half :]], 1).flatten(0, 1)


# -- transformers


def _compare_with_transformers(
    files: FolderFiles, outputs: Outputs, folder: Path
) -> Iterator[Finding]:
    """Compare the logits with those of transformers for the folder or its copy, if it can."""
    name = files.name
    if find_spec("transformers") is None:
        notice("transformers is not installed: nothing is compared with it")
        return
    if not folder.exists():
        notice(f"{name}: cannot be written for transformers: nothing is compared with it")
        return
    try:
        theirs, lacking = _load_in_transformers(folder, outputs.dtype)
    except Exception as error:  # any error of another library
        reason = f"transformers cannot load it ({one_line(error)})"
        if folder == files.folder:
            notice(f"{name}: {reason}")
        else:  # it must be able to load what was written for it
            yield missing("loads in transformers", name, reason)
        return
    detail = f"weights that are not found: {', '.join(lacking[:5])}"
    yield exact("loads in transformers", name, lacking, detail)
    try:
        expected = _their_logits(theirs, outputs.tokens)
    except Exception as error:  # a release may fail in its own forward
        reason = one_line(error)
        notice(f"{name}: no logits are compared: transformers cannot run the model ({reason})")
        return
    tolerance = TOLERANCES[outputs.logits.dtype]
    first = first_difference(outputs.logits, expected, tolerance, 1)
    case, detail = f"{name}, {expected.size(1)} tokens", f"first at position {first}"
    yield close("logits = transformers", case, outputs.logits, expected, tolerance, detail)


@quiet()
def _load_in_transformers(folder: Path, dtype: str) -> tuple[Any, list[str]]:
    """Return the model of transformers and the weights that it did not find.

    No code from the folder is run. Attention is eager, because its SDPA has no soft caps or sinks.
    """
    transformers: Any = importlib.import_module("transformers")
    named = (read_json(folder / CONFIG).get("architectures") or [""])[0]
    known = re.fullmatch(r"\w+For(CausalLM|ConditionalGeneration)", str(named))
    kind = getattr(transformers, str(named), None) if known else None
    theirs, info = (kind or transformers.AutoModelForCausalLM).from_pretrained(
        folder,
        dtype=DTYPES[dtype],
        attn_implementation="eager",
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = [str(one) for key in ("missing_keys", "mismatched_keys") for one in info[key]]
    return theirs.eval(), sorted(missing)


@quiet()
@torch.no_grad()
def _their_logits(theirs: Any, tokens: Tensor) -> Tensor:
    return theirs(tokens).logits
