"""The tensors in the files of a model folder, read a second time.

The second reading finds the parameter of each tensor by rules that share nothing with
`checkpoints.families`. It shows a mistake that reading and writing both make, which a round trip
cannot show.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from transom.base.errors import notice
from transom.base.files import read_json, shown_name
from transom.checkpoints.files.layout import CONFIG, Format, folder_format, names_table
from transom.checkpoints.files.lazy_tensors import LazyTensors
from transom.checkpoints.mapping import clean
from transom.checkpoints.state import open_files
from transom.config.layer_args import RopeLayout
from transom.config.model_args import ModelArgs
from transom.verify.findings import Finding, exact, missing, same_bits


@dataclass(frozen=True)
class FolderFiles:
    """A folder and the tensors in its files, without those that are known and not needed.

    Attributes:
        name: The name in findings.
        folder: The folder.
        format: Its format.
        args: The arguments of its model.
        tensors: The tensors by the keys of the files, not read yet.
    """

    name: str
    folder: Path
    format: Format
    args: ModelArgs
    tensors: LazyTensors


def open_folder(folder: Path, name: str, args: ModelArgs) -> FolderFiles:
    """Open the tensors of a folder, and print a notice about those that are not needed.

    Raises:
        RequestError: If tensors contradict the config.
    """
    tensors = clean(names_table(folder), open_files(folder, args), args, shown_name(folder))
    return FolderFiles(name, folder, folder_format(folder), args, tensors)


_PLACES: dict[str, tuple[str, ...]] = {
    **{f"{letter}_proj": (f"attention.w{letter}",) for letter in "qkvo"},
    **{f"w{letter}": (f"attention.w{letter}",) for letter in "qkvo"},
    **{f"attn_{letter}": (f"attention.w{letter}",) for letter in "qkv"},
    **{f"{part}_proj": (f"attention.w{part}",) for part in ("q_a", "q_b", "kv_b")},
    **{f"{part}_layernorm": (f"attention.{part}_norm",) for part in ("q_a", "kv_a")},
    **{f"{letter}_norm": (f"attention.{letter}_norm",) for letter in "qk"},
    **{f"{part}_norm": (f"{part}_norm",) for part in ("attention", "ffn")},
    "kv_a_proj_with_mqa": ("attention.wkv_a",),
    "attn_output": ("attention.wo",),
    "attn_norm": ("attention_norm",),
    "qkv_proj": ("attention.wq", "attention.wk", "attention.wv"),
    "gate": ("feed_forward.router",),
    "router": ("feed_forward.router",),
    "input_layernorm": ("attention_norm",),
    "pre_feedforward_layernorm": ("ffn_norm",),
    "post_feedforward_layernorm": ("ffn_post_norm",),
}
_FEED_FORWARD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gate_proj", "w1", "ffn_gate"), ("w_gate",)),
    **dict.fromkeys(("up_proj", "w3"), ("w_value",)),
    **dict.fromkeys(("down_proj", "w2", "ffn_down"), ("w_out",)),
    "gate_up_proj": ("w_gate", "w_value"),
}
_OUTSIDE = {
    **dict.fromkeys(("embed_tokens", "tok_embeddings", "token_embd"), "tok_embeddings.weight"),
    **dict.fromkeys(("lm_head", "output"), "output.weight"),
    **dict.fromkeys(("norm", "output_norm"), "norm.weight"),
}


def place_of(key: str, norms_after: bool = False) -> tuple[tuple[str, ...], int | None]:
    """Return the parameters that a key of a file becomes, and the expert that it belongs to.

    Args:
        key: The key; the result is empty if no rule is known for it.
        norms_after: Whether `post_attention_layernorm` comes after attention, and not before the
            feed-forward.
    """
    if "vision" in key:
        return (), None
    inside = re.fullmatch(
        r"(?:\w+\.)*(?:layers|blk)\.(\d+)\.(\w+\.)*?(?:(\d+)\.)?(\w+)\.(weight|bias)", key
    )
    if inside is None:
        outside = re.fullmatch(r"(?:\w+\.)*(\w+)\.weight", key)
        name = _OUTSIDE.get(outside[1]) if outside and "layers." not in key else None
        return (() if name is None else (name,)), None
    layer, _, expert, leaf, kind = inside.groups()
    places = _PLACES.get(leaf, ())
    if leaf in _FEED_FORWARD:
        shared = "shared_expert." if "shared_expert" in key else ""
        group = "experts." if expert else shared
        places = tuple(f"feed_forward.{group}{one}" for one in _FEED_FORWARD[leaf])
    elif leaf == "post_attention_layernorm":
        places = ("attention_post_norm" if norms_after else "ffn_norm",)
    names = tuple(f"layers.{layer}.{place}.{kind}" for place in places)
    return names, None if expert is None else int(expert)


def compare_tensors(files: FolderFiles, parameters: LazyTensors) -> Iterator[Finding]:
    """Compare every tensor that the rules know with the parameter that was read from it."""
    before = [key for key in files.tensors if "input_layernorm" in key]
    norms_after = not before or any("pre_feedforward" in key for key in files.tensors)
    groups: dict[tuple[str, ...], list[tuple[int | None, str]]] = {}
    for key in files.tensors:
        names, expert = place_of(key, norms_after)
        if files.format == "native":
            names, expert = (key,), None
        if names:
            groups.setdefault(names, []).append((expert, key))
    comparison = "parameters = second reading"
    for names, parts in groups.items():
        known = [parameters[name].read() for name in names if name in parameters]
        read = torch.cat(known) if len(known) == len(names) else None
        for expert, key in parts:
            case, joined = f"{files.name}, {key}", " and ".join(names)
            if read is None:
                yield missing(comparison, case, f"the model does not have {joined}")
                continue
            measured, stored = read if expert is None else read[expert], files.tensors[key].read()
            yield same_bits(comparison, case, measured, stored, f"{joined} have other numbers")
    unknown = len(parameters.keys() - {name for names in groups for name in names})
    if unknown:
        notice(f"{files.name}: {unknown} of {len(parameters)} parameters have no second reading")


def compare_rope_layout(files: FolderFiles) -> Iterator[Finding]:
    """Compare the layout of RoPE with the one that the makers of the format use."""
    if files.format == "native":
        return  # the config states it
    family = names_table(files.folder)
    pairs = family.startswith(("params_", "llama4", "gguf_llama"))
    if family == "deepseek_v3":
        pairs = bool(read_json(files.folder / CONFIG).get("rope_interleave", True))
    expected: RopeLayout = "interleaved" if pairs else "halves"
    detail = f"read as {files.args.rope_layout}, the files are {expected}"
    yield exact("RoPE layout", files.name, files.args.rope_layout != expected, detail)
