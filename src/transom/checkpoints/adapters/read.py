"""Read adapters: folders of PEFT, and `lora.safetensors` of mistral-finetune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError, expect, notice, require
from transom.base.files import read_json
from transom.checkpoints.adapters.foreign_leaves import (
    MISTRAL,
    Naming,
    experts_from_peft,
    is_parameter,
    leaf_paths,
    namings,
    site_of,
)
from transom.checkpoints.adapters.peft_config import PeftConfig, read_peft
from transom.checkpoints.files.consolidated import read_pickled
from transom.checkpoints.files.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PARAMS
from transom.checkpoints.files.lazy_tensors import LazyTensor, LazyTensors
from transom.checkpoints.files.safetensors_files import read_safetensors
from transom.checkpoints.mapping import drop_tied_output, sort_keys, tell_unread, to_ours
from transom.lora.adapters import activate_adapters, attach, train_adapters
from transom.lora.args import Scaling
from transom.lora.vocabulary import resize_vocabulary
from transom.lora.weights import LoraWeights, Replacement
from transom.models.llm import LLM
from transom.names.tables import KeyMapping
from transom.names.transforms import Shape

PICKLED = "adapter_model.bin"
MISTRAL_WEIGHTS = "lora.safetensors"
MISTRAL_SCALING = 2.0  # the default of mistral-inference's `load_lora`
_VOCABULARY = ("tok_embeddings.weight", "output.weight")  # parameters with one row per token

AdapterParts = dict[str, LoraWeights | Replacement]


def load_adapter(
    model: LLM,
    folder: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    scaling: float | None = None,
) -> LLM:
    """Put an adapter on a model, in place, as the only active one; return the model.

    The vocabulary grows to that of an adapter with new tokens.

    Args:
        model: The base of the adapter.
        folder: A folder of PEFT (LoRA, rsLoRA, DoRA), or one with Mistral's `lora.safetensors`.
        name: The name of the adapter on the model.
        trainable: Train the adapter and freeze everything else. Otherwise it is frozen.
        scaling: The factor before Mistral's adapter; None takes that of `params.json`.

    Raises:
        RequestError: The folder is no adapter or is damaged, it has a feature that is not
            supported, or one of its keys has no place in the model. The model is unchanged.
    """
    here = Path(folder)
    if (here / ADAPTER_CONFIG).exists():
        require(scaling is None, "scaling", scaling, f"valid only without {ADAPTER_CONFIG}")
        parts = _peft_parts(model, here)
    elif (here / MISTRAL_WEIGHTS).exists():
        parts = _mistral_parts(model, here, scaling)
    else:
        raise RequestError(
            f"{here}: no {ADAPTER_CONFIG} and no {MISTRAL_WEIGHTS}; expected an adapter folder"
        )
    attach(model, name, parts)
    activate_adapters(model, (name,))
    for part in parts.values():
        part.requires_grad_(False)
    if trainable:
        train_adapters(model, (name,))
    return model


def adapter_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Return the bytes of an adapter of PEFT on a model of a dtype.

    Embeddings count that PEFT saves beside an adapter on them, though they may be the model's own.
    """
    stored = _state(_files(folder)[0])
    widths = {k: max(x.itemsize, 4) if "lora_" in k else dtype.itemsize for k, x in stored.items()}
    return sum(x.numel() * widths[key] for key, x in stored.items())


def _files(folder: Path) -> list[Path]:
    """Return the file of an adapter of PEFT, and the others that are there."""
    names = (ADAPTER_WEIGHTS, PICKLED, MISTRAL_WEIGHTS)
    present = [name for name in names if (folder / name).exists()]
    path = PICKLED if present[:1] == [PICKLED] else ADAPTER_WEIGHTS
    return [folder / name for name in dict.fromkeys((path, *present))]


def _state(path: Path) -> dict[str, Tensor]:
    return read_pickled(path) if path.suffix == ".bin" else read_safetensors(path)


def _peft_parts(model: LLM, folder: Path) -> AdapterParts:
    config = read_peft(read_json(folder / ADAPTER_CONFIG), str(folder / ADAPTER_CONFIG))
    path, *others = _files(folder)
    if others:
        ignored = ", ".join(other.name for other in others)
        notice(f"{folder}: the adapter is read from {path.name}; ignored: {ignored}")
    return _parts(namings(model), path, config, config.scaling)


def _mistral_parts(model: LLM, folder: Path, scaling: float | None) -> AdapterParts:
    path, params = folder / MISTRAL_WEIGHTS, folder / PARAMS
    stated = read_json(params).get("lora") if scaling is None and params.exists() else None
    if isinstance(stated, dict):
        scaling = stated.get("scaling")
    if scaling is None:
        scaling = MISTRAL_SCALING
        notice(
            f"{path}: no {PARAMS} states the scaling; {scaling} is used, as in mistral-inference"
        )
    number = isinstance(scaling, int | float) and not isinstance(scaling, bool)
    expect(number, f"{params}: lora.scaling", scaling, "a number")
    config = PeftConfig("LORA", r=None, lora_alpha=float(scaling))
    return _parts([Naming(MISTRAL, model)], path, config, "direct")


class AdapterFile:
    """The tensors of an adapter file as one family names them.

    Args:
        naming: The names of the family.
        config: What the adapter computes.
        state: The tensors by their keys in the file.
        where: The file, for messages.

    Attributes:
        low_rank: The rows of every weight with an adapter, by the mapping of the weight.
        full: The mappings of parameters that are saved in full (`modules_to_save`).
        rows: All of these rows.
        complete: Whether the family has a name for every tensor.
    """

    def __init__(self, naming: Naming, config: PeftConfig, state: LazyTensors, where: str) -> None:
        self.naming, self.config, self.where = naming, config, where
        model, key = naming.model, naming.known_key
        layers = model.args.n_layers
        self._source, self._unread = sort_keys(naming.names, key, state, layers, where)
        sites = [s for s in naming.sites if config.is_target_parameter(naming.spellings(s))]
        paths = naming.paths(sites)
        weights = dict.fromkeys(naming.sites.values())
        rows = {weight: naming.rows(weight, paths, config.use_dora) for weight in weights}
        self.low_rank = {weight: some for weight, some in rows.items() if any(map(self._has, some))}
        self.full = list(filter(self._has, naming.mappings))
        self.rows = [*(row for some in self.low_rank.values() for row in some), *self.full]
        tied = {naming.names.key_of("output.weight")} if model.args.tie_embeddings else set()
        named = {key for row in self.rows for key in row.foreign}
        self.complete = self._source.keys() <= named | tied

    def _has(self, row: KeyMapping) -> bool:
        return any(key in self._source for key in row.foreign)

    def read(self, scaling: Scaling) -> AdapterParts:
        """Return the adapter by modules; the vocabulary of the model grows to that of the adapter.

        Raises:
            RequestError: Tensors are missing, left over or of other shapes than the model has.
        """
        naming, args = self.naming, self.naming.model.args
        tell_unread(self._unread, self.where)
        output, key = map(naming.names.key_of, ("output.weight", "tok_embeddings.weight"))
        # Without its key, PEFT leaves the output as it was, unless it ties it to the embeddings.
        if args.tie_embeddings and (output in self._source or not self.config.ensure_weight_tying):
            own = naming.model.tok_embeddings.weight
            drop_tied_output(naming.names, self._source, self.where, own)
        embeddings = self._source.get(key)
        tokens = max(args.vocab_size, 0 if embeddings is None else embeddings.shape[0])
        shapes = self._shapes_of_whole(tokens)
        alphas: dict[KeyMapping, float] = {}
        for weight, rows in self.low_rank.items():
            rank, alphas[weight] = self._rank_and_alpha(weight, rows)
            made = naming.shapes(weight, rank)
            shapes |= {name: made[name] for row in rows for name in row.ours}
        found = to_ours(self.rows, self._source, shapes, self.where)
        ours = {name: self._placed(name, lazy.read()) for name, lazy in found.items()}
        if tokens > args.vocab_size:
            more = tokens - args.vocab_size
            notice(f"{self.where}: its vocabulary has {more} tokens more than the base's")
            resize_vocabulary(naming.model, tokens)
        parts: AdapterParts = {}
        for weight, alpha in alphas.items():
            shared = nn.Parameter(ours[f"{leaf_paths(weight)[0]}.A"])
            for path in leaf_paths(weight):
                parts[path] = LoraWeights(
                    shared,
                    ours[f"{path}.B"],
                    alpha,
                    scaling,
                    dropout=self.config.lora_dropout,
                    magnitude=ours.get(f"{path}.magnitude"),
                    family=naming.family,
                )
        return parts | self._replacements(ours, parts)

    def _rank_and_alpha(self, weight: KeyMapping, rows: Sequence[KeyMapping]) -> tuple[int, float]:
        """Return rank and alpha of one adapter; that of fused experts is laid out as their weight.

        Raises:
            RequestError: Experts of one weight differ in them, or A has another rank.
        """
        naming, sites = self.naming, [site_of(key) for key in weight.foreign]
        each = {self.config.rank_and_alpha(naming.spellings(site)) for site in sites}
        expected = "one rank and one alpha for all experts of a layer"
        expect(len(each) == 1, f"{self.where}: {sites[0]}", len(each), expected)
        a, b = (row.foreign[0] for row in rows[:2])
        if is_parameter(weight) and a in self._source and b in self._source:
            both = (self._source[key].read() for key in (a, b))
            laid_out = map(LazyTensor.of, experts_from_peft(naming, sites[0], *both))
            self._source |= zip((a, b), laid_out, strict=True)
        rank, alpha = each.pop()
        shape = self._source[a].shape if a in self._source else ()
        own = shape[-2] if len(shape) >= 2 + is_parameter(weight) else 0  # 0: reported by `to_ours`
        rank = own if rank is None else rank
        expected = f"{rank}, as in the config"
        expect(own in (0, rank), f"{self.where}: {sites[0]}: rank", own, expected)
        return rank, alpha

    def _shapes_of_whole(self, tokens: int) -> dict[str, Shape]:
        out: dict[str, Shape] = {}
        for name in (name for row in self.full for name in row.ours):
            first, *others = self.naming.model.get_parameter(name).shape
            out[name] = (tokens if name in _VOCABULARY else first, *others)
        return out

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy in our rotary layout, with the device and dtype that the model wants."""
        if name.rpartition(".")[2] in ("A", "B", "magnitude"):
            # Half precision loses the small steps of training.
            dtype = torch.promote_types(tensor.dtype, torch.float32)
        else:
            dtype = self.naming.model.get_parameter(name).dtype
        ordered = self.naming.reordered(name, tensor, to_ours=True)
        # The leaf is on meta if its weights are offloaded.
        return ordered.to(self.naming.model.device, dtype, copy=True).contiguous()

    def _replacements(
        self, ours: Mapping[str, Tensor], parts: Mapping[str, object]
    ) -> dict[str, Replacement]:
        """Return the parameters that are saved in full, by module.

        PEFT saves embeddings beside their adapter; parameters equal to the model's own are left
        out.
        """
        out: dict[str, dict[str, Tensor]] = {}
        for name in (name for row in self.full for name in row.ours):
            own, (path, _, last) = self.naming.model.get_parameter(name), name.rpartition(".")
            if not own.is_meta and torch.equal(ours[name], own):
                continue
            if path in parts:
                found = f"an adapter on {path} and a {last} of its own"
                raise RequestError(f"{self.where}: {found}; expected one of them")
            out.setdefault(path, {})[last] = ours[name]
        return {path: Replacement(tensors) for path, tensors in out.items()}


def _parts(
    choices: Sequence[Naming], path: Path, config: PeftConfig, scaling: Scaling
) -> AdapterParts:
    """Return an adapter as the first family reads it that has a name for every tensor."""
    state = {key: LazyTensor.of(tensor) for key, tensor in _read_tensors(path).items()}
    files = [AdapterFile(naming, config, state, str(path)) for naming in choices]
    return next((file for file in files if file.complete), files[0]).read(scaling)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    state = _state(path)
    if not state:
        raise RequestError(f"{path}: no tensors; expected at least one")
    broken = [key for key, tensor in state.items() if not bool(tensor.float().isfinite().all())]
    if broken:
        notice(f"{path}: {len(broken)} tensors hold NaN or infinite numbers, first {broken[0]}")
    return state
