"""Weights from a folder into a model, and back to disk: native and Hugging Face layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from transom.args import ModelArgs
from transom.checkpoints.folders import (
    CHECKSUMS,
    MODEL_TYPE,
    model_folder,
    read_args,
    read_json,
    verify_checksums,
)
from transom.checkpoints.hf_config import args_from_hf
from transom.checkpoints.hf_export import args_to_hf
from transom.checkpoints.mapping import account, clean, to_foreign, to_ours
from transom.errors import RequestError, WorkError
from transom.model import LLM
from transom.names import moves
from transom.runtime import DTYPES, pick_device
from transom.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"


def load(folder: str | Path, device: str = "cpu", dtype: str | None = None) -> LLM:
    """The model of a folder, weights in the files' own dtype unless one is named; ready for inference."""
    where = model_folder(folder)
    target = pick_device(device)
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype = {dtype!r}: accepted is {', '.join(DTYPES)}")
    if (where / CHECKSUMS).exists():
        verify_checksums(where)
    args = read_args(where)
    with torch.device("meta"):
        model = LLM(args)
    state = read_state(where, args, model)
    # The biases that help to choose experts move in steps too small for half precision, and no product reads them.
    wide = {name for name in state if name.endswith("choice_bias")}
    kinds = {tensor.dtype for name, tensor in state.items() if name not in wide}
    kind = DTYPES[dtype] if dtype else max(kinds, key=lambda k: k.itemsize)
    kind_of = {name: torch.promote_types(kind, torch.float32) if name in wide else kind for name in state}
    # clone: tensors read from a file share its memory map, whose alignment would change the last bit.
    placed = {name: tensor.to(target, kind_of[name], copy=True).contiguous() for name, tensor in state.items()}
    model.load_state_dict(placed, strict=True, assign=True)
    return model.eval()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder, or of a run's best step."""
    return Tokenizer.load(model_folder(folder))


def read_state(folder: Path, args: ModelArgs, model: LLM) -> dict[str, Tensor]:
    """Our state dict from the folder's files, every key accounted for and every shape checked."""
    config = read_json(folder / "config.json")
    source = read_tensors(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if config.get("model_type") == MODEL_TYPE:
        account(str(folder), sorted(set(shapes) - set(source)), sorted(set(source) - set(shapes)), [])
        state = source
    else:
        family = config["model_type"]
        source = clean(family, source, args, str(folder))
        state = to_ours(moves(family, args, shapes), source, shapes, str(folder))
    for name, tensor in state.items():
        if tuple(tensor.shape) != shapes[name]:
            raise RequestError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, config.json asks for {shapes[name]}"
            )
    return state


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors` or of the shards its index names."""
    index = folder / f"{WEIGHTS}.index.json"
    files = [WEIGHTS]
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise RequestError(f"{index}: weight_map = {table!r}: accepted is a mapping of keys to file names")
        files = sorted(set(table.values()))
    out: dict[str, Tensor] = {}
    for name in files:
        out |= read_safetensors(folder / name)
    return out


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; a missing, cut or damaged file is a `RequestError` naming it."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{path}: not a whole safetensors file ({error})") from None


def save(
    model: LLM,
    folder: str | Path,
    format: Literal["native", "hf"] = "native",
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write config, weights and tokenizer into `folder`; `hf` is what transformers and its peers read."""
    out = Path(folder)
    state = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    if format == "native":
        config: dict[str, Any] = {"model_type": MODEL_TYPE, **model.args.to_dict()}
    elif format == "hf":
        config = args_to_hf(model.args)
        dtype = next(model.parameters()).dtype
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        if model.args.rope_layout == "interleaved" and args_from_hf(config, str(out)).rope_layout == "halves":
            state = {name: _to_halves(name, tensor, model.args) for name, tensor in state.items()}
        state = to_foreign(moves(config["model_type"], model.args, state), state, str(out))
    else:
        raise RequestError(f"format = {format!r}: accepted is native or hf")
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(out)
        eos = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        write_text(out / "generation_config.json", json.dumps(eos, indent=2))
        if format == "hf":
            config |= eos
    write_tensors(out / WEIGHTS, state)
    write_text(out / "config.json", json.dumps(config, indent=2))


def _to_halves(name: str, tensor: Tensor, args: ModelArgs) -> Tensor:
    """Rotary rows of what makes queries and keys, per head from interleaved pairs to halves; others as they are."""
    *_, leaf, _ = name.split(".")
    if leaf not in ("wq", "wk", "q_norm", "k_norm") or not name.startswith("layers."):
        return tensor
    heads = tensor.unflatten(0, (-1, args.head_size))
    turned, rest = heads.split((args.rotary_dim, args.head_size - args.rotary_dim), 1)
    turned = turned.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((turned, rest), 1).flatten(0, 1)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file; a full disk is a `WorkError`."""
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise WorkError(f"{path}: could not be written ({error})") from None


def write_text(path: Path, text: str) -> None:
    """One text file; a full disk is a `WorkError`."""
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise WorkError(f"{path}: could not be written ({error})") from None
