"""The whole of a run as one strict, frozen piece of data: what `config.yaml` may say. No torch."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transom.base.errors import RequestError, require
from transom.base.fields import check_seed, describe, read, type_at, write
from transom.base.yaml_files import read_yaml, word_value
from transom.config.layer_args import HeadArgs
from transom.config.model_args import ModelArgs
from transom.config.presets import preset
from transom.data.text.sources import SourceArgs
from transom.training.finetune.args import FinetuneArgs
from transom.training.optim.schedule import ScheduleArgs

DEFAULT_ROWS = 8  # of a step of pretraining


@dataclass(frozen=True)
class TokenizerArgs:
    """Which tokenizer: trained on the run's own text, or read from a file."""

    kind: Literal["bpe", "chars", "bytes", "file"] = describe("bpe", "how text becomes tokens")
    vocab_size: int = describe(2048, "size of a trained bpe vocabulary", "tokens")
    path: str | None = describe(
        None, "tokenizer.json or a folder with one, for kind file", path=True
    )

    def __post_init__(self) -> None:
        needed = (self.path is not None) == (self.kind == "file")
        require(
            needed,
            "tokenizer.path",
            self.path,
            "valid only together with tokenizer.kind = file, and only then",
        )


@dataclass(frozen=True)
class DataArgs:
    """Where text comes from and how it is cut into rows."""

    sources: str | tuple[SourceArgs | str, ...] = describe(
        (),
        "files, folders or globs of text, .jsonl or .parquet; a path, a list of paths, or of "
        "path and weight",
    )
    held_out: float = describe(
        0.05, "share of documents kept for measuring, chosen by hash of their name"
    )
    seq_len: int = describe(256, "length of a training row", "tokens")
    batch_size: int | None = describe(
        None,
        "rows per step, all ranks and micro-batches together; null: chosen by the number of rows "
        f"for fine-tuning and labelled lines, {DEFAULT_ROWS} for text",
        "rows",
    )
    cache_dir: str | None = describe(
        None, "where tokenised shards are kept; $TRANSOM_CACHE or ~/.cache/transom", path=True
    )

    def __post_init__(self) -> None:
        require(
            0 <= self.held_out < 1,
            "data.held_out",
            self.held_out,
            "expected 0 or more and less than 1",
        )
        require(self.seq_len >= 1, "data.seq_len", self.seq_len, "expected 1 or more")
        size = self.batch_size
        require(size is None or size >= 1, "data.batch_size", size, "expected 1 or more, or null")

    @property
    def rows_per_step(self) -> int:
        """Return `batch_size`, or the default for text where it is left open."""
        return DEFAULT_ROWS if self.batch_size is None else self.batch_size

    @property
    def source_list(self) -> list[SourceArgs]:
        """The sources as `SourceArgs`, at least one."""
        given = (self.sources,) if isinstance(self.sources, str) else self.sources
        require(
            len(given) > 0,
            "data.sources",
            list(given),
            "expected at least one file, folder or glob",
        )
        sources = [
            read(SourceArgs, {"path": one}, "data.sources") if isinstance(one, str) else one
            for one in given
        ]
        labels = [source.label for source in sources]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        require(
            twice is None,
            "data.sources",
            twice,
            "there twice; expected one entry for each name or path",
        )
        return sources


@dataclass(frozen=True)
class OptimizerArgs:
    """Which optimizer trains which parameters, at which peak learning rates."""

    name: Literal["adamw", "muon"] = describe(
        "adamw", "optimizer of the block matrices; the rest uses AdamW"
    )
    lr: float = describe(3e-4, "peak learning rate of AdamW")
    betas: tuple[float, float] = describe((0.9, 0.95), "AdamW: decay of the two running means")
    eps: float = describe(1e-8, "AdamW: added to the denominator")
    weight_decay: float = describe(
        0.1, "decoupled decay of everything but vectors", "per unit of learning rate"
    )
    muon_lr: float = describe(0.02, "peak learning rate of Muon")
    muon_momentum: float = describe(0.95, "Muon: decay of the running mean")
    muon_steps: int = describe(
        4, "Muon: orthogonalisation steps; 4 is cheap, 7 nearly exact", "steps"
    )
    embedding_lr: float | None = describe(None, "peak rate of tok_embeddings; lr if not given")
    output_lr: float | None = describe(
        None, "peak rate of an untied output matrix; lr if not given"
    )
    norm_lr: float | None = describe(
        None, "peak rate of norms, biases and scalars; lr if not given"
    )
    max_grad_norm: float | None = describe(
        1.0, "gradients are scaled down to this global norm; none: no clipping"
    )
    state_bits: Literal[32, 8] = describe(
        32,
        "AdamW: bits of a running mean; 8 takes a quarter of the memory (arXiv 2110.02861), "
        "embeddings keep 32",
    )
    in_backward: bool = describe(
        False,
        "each weight moves as soon as its gradient is there, which is then freed; excludes "
        "clipping",
    )

    def __post_init__(self) -> None:
        require(self.name in ("adamw", "muon"), "name", self.name, "expected one of adamw, muon")
        require(self.state_bits in (32, 8), "state_bits", self.state_bits, "expected one of 32, 8")
        for name in ("lr", "muon_lr", "eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, name, value, "expected a number above 0")
        for name in ("embedding_lr", "output_lr", "norm_lr", "max_grad_norm"):
            value = getattr(self, name)
            valid = value is None or 0 < value < math.inf
            require(valid, name, value, "expected none or a number above 0")
        two_fractions = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(
            two_fractions,
            "betas",
            self.betas,
            "expected two numbers, each at least 0 and below 1",
        )
        momentum = self.muon_momentum
        require(0 <= momentum < 1, "muon_momentum", momentum, "expected at least 0 and below 1")
        decay = self.weight_decay
        require(0 <= decay < math.inf, "weight_decay", decay, "expected a number from 0")
        require(1 <= self.muon_steps <= 7, "muon_steps", self.muon_steps, "expected 1 to 7")

    def check_in_backward(
        self, accumulate: int = 1, *, ranks: int = 1, scaled: bool = False
    ) -> None:
        """Refuse `in_backward` with what needs whole gradients: clipping, accumulation, ranks, a
        float16 scaler.
        """
        needs = {
            f"max_grad_norm = null, not {self.max_grad_norm}": self.max_grad_norm is not None,
            f"accumulate = 1, not {accumulate}": accumulate != 1,
            f"one rank, not {ranks}": ranks != 1,
            "a dtype without loss scaling, not float16": scaled,
        }
        expected = "valid only with " + " and with ".join(
            words for words, wrong in needs.items() if wrong
        )
        refused = self.in_backward and any(needs.values())
        require(not refused, "optimizer.in_backward", self.in_backward, expected)


@dataclass(frozen=True)
class TrainArgs:
    """One run; a wrong key or value is a `RequestError` naming the field and what is expected."""

    out: str = describe("runs/train", "run folder to write", path=True)
    seed: int = describe(0, "seed of weights, data order and samples")
    model: str | dict[str, Any] = describe(
        "demo", "a preset's name, or model fields; {preset: NAME, field: value} changes a preset"
    )
    base: str | None = describe(
        None,
        "folder or hub id of a model to start from, in place of `model` and `tokenizer`",
        path=True,
    )
    finetune: FinetuneArgs | None = describe(
        None, "fine-tuning of `base`; null: it goes on reading plain text"
    )
    tokenizer: TokenizerArgs = describe(TokenizerArgs, "how text becomes tokens")
    data: DataArgs = describe(DataArgs, "where text comes from")
    optimizer: OptimizerArgs = describe(OptimizerArgs, "how weights move")
    schedule: ScheduleArgs = describe(ScheduleArgs, "how the learning rate moves")
    steps: int = describe(1000, "optimizer steps")
    accumulate: int = describe(1, "micro-batches a step is cut into, to save memory")
    loss_chunk: int | None = describe(
        None,
        "tokens whose logits are held at a time, 0: all; absent: all of up to 4 million logits, "
        "else 16 million",
        "tokens",
    )
    activation_checkpoint: str = describe(
        "none",
        "what is made again in backward: none, full (all blocks), every-K (each K-th), selective "
        "(no products)",
    )
    activation_offload: bool = describe(
        False, "keep large activations in host memory until backward; GPUs only"
    )
    compile: bool = describe(
        False, "compile the blocks with torch.compile; said and left out where that fails"
    )
    dry_run: bool = describe(
        True, "try a micro-batch of full size before the run begins, and say what it takes"
    )
    contrastive_temperature: float = describe(
        0.05, "embedding head: products of vectors are divided by this"
    )
    ema_decay: float | None = describe(
        None, "moving average of the weights that is scored, sampled and saved; null: none"
    )
    short_rows: float = describe(
        0.0,
        "first share of the steps in which rows are cut in `short_rows_split` (Shortformer, "
        "arXiv 2012.15832)",
    )
    short_rows_split: int = describe(2, "pieces a row is cut into while rows are short")
    device: str = describe("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = describe(
        "auto", "dtype of the products; weights stay float32; float16 needs a GPU"
    )
    threads: int | None = describe(None, "CPU threads; torch's own choice when absent")
    eval_every: int = describe(
        0, "steps between held-out scores; 0 scores only at the end", "steps"
    )
    eval_tokens: int | None = describe(
        100_000, "held-out tokens scored during training; all at the end", "tokens"
    )
    save_every: int = describe(
        500, "steps between checkpoints; the last step is always saved", "steps"
    )
    keep_last: int = describe(2, "checkpoints kept, besides the best", "checkpoints")
    patience: int | None = describe(
        None,
        "stop early after this many held-out scores without a better one; null: never",
        "measurements",
    )
    sample_every: int = describe(0, "steps between samples; 0 never samples", "steps")
    sample_prompts: tuple[str, ...] = describe(
        ("The",), "prompts of the samples drawn during training"
    )
    sample_tokens: int = describe(64, "length of a sample", "tokens")
    tensorboard: bool = describe(
        False, "also write TensorBoard curves into the run folder; needs the package"
    )

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "accumulate",
            "short_rows_split",
            "save_every",
            "keep_last",
            "sample_tokens",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "expected 1 or more")
        for name in ("eval_every", "sample_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "expected 0 or more")
        require(
            self.threads is None or self.threads >= 1,
            "threads",
            self.threads,
            "expected 1 or more, or null",
        )
        self._check_patience()
        prompts = list(self.sample_prompts)
        require(
            len(prompts) > 0 and all(prompts),
            "sample_prompts",
            prompts,
            "expected a list of non-empty texts",
        )
        require(0 <= self.short_rows <= 1, "short_rows", self.short_rows, "expected 0 to 1")
        require(
            self.loss_chunk is None or self.loss_chunk >= 0,
            "loss_chunk",
            self.loss_chunk,
            "expected 0 or more",
        )
        decay = self.ema_decay
        require(
            decay is None or 0 < decay < 1,
            "ema_decay",
            decay,
            "expected a number above 0 and below 1, or null",
        )
        self._check_checkpointing()
        self.optimizer.check_in_backward(self.accumulate)
        size = self.data.batch_size
        fits = size is None or size % self.accumulate == 0
        expected = f"expected a divisor of data.batch_size = {size}"
        require(fits, "accumulate", self.accumulate, expected)
        if self.short_rows:
            fits = self.data.seq_len % self.short_rows_split == 0
            expected = f"expected a divisor of data.seq_len = {self.data.seq_len}"
            require(fits, "short_rows_split", self.short_rows_split, expected)
        check_seed(self.seed)
        self._check_base()
        if self.base is None:
            self.check_model(self.model_args(vocab_size=None))

    def _check_base(self) -> None:
        require(
            self.finetune is None or self.base is not None,
            "finetune",
            "given",
            "valid only together with base",
        )
        if self.base is None:
            return
        require(
            self.model == "demo",
            "model",
            self.model,
            "valid only without base, which brings its own",
        )
        plain = self.tokenizer == TokenizerArgs()
        require(plain, "tokenizer", "given", "valid only without base, which brings its own")
        rows_of_text = self.finetune is None or not self.short_rows
        require(
            rows_of_text,
            "short_rows",
            self.short_rows,
            "valid only with finetune is 0: a row holds whole examples",
        )

    def check_model(self, args: ModelArgs) -> None:
        """Refuse what does not go with this model, the config's own or that of `base`."""
        expected = f"expected at most model.max_seq_len = {args.max_seq_len}"
        require(self.data.seq_len <= args.max_seq_len, "data.seq_len", self.data.seq_len, expected)
        if args.head is not None:
            self._check_head(args.head)
            return
        both_ways = any(layer.rule.kind == "full" for layer in args.layers)
        expected = (
            "valid only with model.head only: a layer that sees later tokens sees those it is to "
            "predict"
        )
        require(not both_ways, "model.layer_pattern", args.pattern, expected)
        require(
            args.context_dim is None,
            "model.context_dim",
            args.context_dim,
            "expected null: rows are text",
        )

    def _check_patience(self) -> None:
        patience = self.patience
        require(
            patience is None or patience >= 1,
            "patience",
            patience,
            "expected 1 or more, or null",
        )
        measured = (
            patience is None
            or self.eval_every > 0
            or (self.finetune is not None and self.finetune.scores > 0)
        )
        require(
            measured,
            "patience",
            patience,
            "valid only with eval_every of 1 or more, as scores are what it counts",
        )

    def _check_checkpointing(self) -> None:
        how = self.activation_checkpoint
        known = re.fullmatch(r"none|full|selective|every-[1-9]\d*", how) is not None
        expected = "expected none, full, selective or every-K, such as every-2"
        require(known, "activation_checkpoint", how, expected)
        # Products inside a compiled function cannot be told from the rest of it: all would be made
        # again.
        expected = "valid only with compile = True is none, full or every-K"
        require(not self.compile or how != "selective", "activation_checkpoint", how, expected)

    def _check_head(self, head: HeadArgs) -> None:
        temperature = self.contrastive_temperature
        require(
            temperature > 0, "contrastive_temperature", temperature, "expected a number above 0"
        )
        require(
            not self.short_rows,
            "short_rows",
            self.short_rows,
            "expected 0 with model.head: a row is a text",
        )
        expected = "expected 0 with model.head, which writes no text"
        require(not self.sample_every, "sample_every", self.sample_every, expected)
        # Negatives are the other rows of a micro-batch: cutting a step changes the loss.
        whole = head.kind == "classification" or self.accumulate == 1
        require(whole, "accumulate", self.accumulate, "expected 1 with an embedding head")

    def model_args(self, vocab_size: int | None) -> ModelArgs:
        """The model asked for; its vocabulary is the tokenizer's unless the config gives one at
        least as large.
        """
        given: dict[str, Any] = (
            {"preset": self.model} if isinstance(self.model, str) else dict(self.model)
        )
        name = given.pop("preset", None)
        if vocab_size is not None:
            asked = given.setdefault("vocab_size", vocab_size)
            expected = f"expected at least the tokenizer's {vocab_size}"
            require(
                isinstance(asked, int) and asked >= vocab_size, "model.vocab_size", asked, expected
            )
        try:
            return preset(name, **given) if name is not None else ModelArgs.from_dict(given)
        except RequestError as error:
            raise RequestError(f"model.{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain data; `read_config` takes it back."""
        data = write(self)
        assert isinstance(data, dict)
        return data


def read_config(
    path: str | Path | None, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> TrainArgs:
    """The config of a YAML file (or `base`, or nothing) with `key.sub=value` overrides of the
    declared types.
    """
    data: dict[str, Any] = copy.deepcopy(dict(base or {}))
    if path is not None:
        data = read_yaml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RequestError(
                f"{override!r}: expected key=value, such as steps=100 or data.seq_len=128"
            )
        keys = key.split(".")
        _set(data, keys, word_value(_declared(keys), text, key), key)
    return read(TrainArgs, data)


def _declared(keys: Sequence[str]) -> Any:
    """The type of a dotted field; those below `model` are fields of a model, or the name of a
    preset.
    """
    if keys[0] == "model" and len(keys) > 1:
        return str if keys[1:] == ["preset"] else type_at(ModelArgs, keys[1:])
    return type_at(TrainArgs, keys)


def _set(data: dict[str, Any], keys: list[str], value: Any, whole: str) -> None:
    for key in keys[:-1]:
        if key == "model" and isinstance(
            data.get(key, "demo"), str
        ):  # model.dim=64 changes the preset named
            data[key] = {"preset": data.get(key, "demo")}
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            raise RequestError(f"{whole}: {key} is {inner!r}, which has no fields")
        data = inner
    data[keys[-1]] = value
