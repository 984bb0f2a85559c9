"""From a config to a trainer that is ready to step: tokenizer, corpora, batches, model, run folder."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.device_mesh import DeviceMesh

from transom import __version__
from transom.checkpoints.folders import read_json, read_pointer
from transom.checkpoints.load import write_text
from transom.data.batches import Batches
from transom.data.shards import Corpus, prepare
from transom.data.sources import SourceArgs, held_out, read_split
from transom.errors import RequestError, notice, require
from transom.model import LLM
from transom.planning.counts import parameters
from transom.runtime import DTYPES, machine, pick_device, pick_dtype, seed_everything
from transom.tokenizer import Tokenizer, byte_tokenizer, train_bpe, train_chars
from transom.training.config import TrainArgs, read_config
from transom.training.run_folder import RunFolder
from transom.training.trainer import Trainer

# What may differ between a run and its continuation: none of it changes the arithmetic of a step.
FREE_ON_RESUME = {
    "out",
    "eval_every",
    "eval_tokens",
    "save_every",
    "keep_last",
    "sample_every",
    "sample_prompts",
    "sample_tokens",
}


def open_run(
    args: TrainArgs,
    *,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
    profile_steps: int = 0,
    rank: int = 0,
    world_size: int = 1,
    mesh: DeviceMesh | None = None,
) -> Trainer:
    """A trainer on a prepared run folder; with `resume` at the state of its latest step."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # Adam's second moments decay into denormals, which are 100x slower
    seed_everything(args.seed)
    run = RunFolder(args.out)
    shares = args.accumulate * world_size
    accepted = f"accepted is a multiple of accumulate x ranks = {shares}"
    require(args.data.batch_size % shares == 0, "data.batch_size", args.data.batch_size, accepted)
    if rank == 0:  # the others may look when rank 0 has begun to fill the folder
        run.check(overwrite=overwrite, resume=resume)
    if resume:
        check_same_run(run.path, args)
        dtype = check_same_machine(run.path, device, dtype)
    tokenizer = run_tokenizer(args, run, resume)
    corpora = open_corpora(args, tokenizer, quiet=quiet)
    model_args = args.model_args(tokenizer.vocab_size)
    model = LLM(model_args)
    if not resume:
        model.init_weights(args.seed)
    model.to(device)
    batches = Batches(
        [corpus.train for corpus in corpora.values()],
        [source.weight for source in args.data.source_list],
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        vocab_size=model_args.vocab_size,
        seq_len=args.data.seq_len,
        rows_per_step=args.data.batch_size,
        seed=args.seed,
        rank=rank,
        world_size=world_size,
    )
    data = {name: corpus.sha256 for name, corpus in corpora.items()}
    trainer = Trainer(
        args=args,
        model=model,
        tokenizer=tokenizer,
        batches=batches,
        held_out={name: corpus.held_out for name, corpus in corpora.items()},
        run=run,
        device=device,
        dtype=dtype,
        rank=rank,
        world_size=world_size,
        mesh=mesh,
        quiet=quiet,
        profile_steps=profile_steps,
        data_hashes=data,
    )
    if resume:
        check_same_data(run.path, data, tokenizer)
    if rank == 0:  # only now: a request that turns out wrong must not cost the run it would overwrite
        run.prepare(resume=resume)
    if resume:
        trainer.resume()
    elif rank == 0:
        write_run(run.path, trainer)
    return trainer


def run_tokenizer(args: TrainArgs, run: RunFolder, resume: bool) -> Tokenizer:
    """The run's tokenizer: its own when resuming, else as the config says, trained on training documents only."""
    if resume:
        step = read_pointer(run.path, "latest")
        assert step is not None, "RunFolder.check has refused a run without steps"
        return Tokenizer.load(step)
    kind = args.tokenizer.kind
    if kind == "file":
        assert args.tokenizer.path is not None, "TokenizerArgs checks it"
        return Tokenizer.load(args.tokenizer.path)
    if kind == "bytes":
        return byte_tokenizer()
    texts = (
        document.text
        for source in args.data.source_list
        for document in read_split(source, args.data.held_out)
        if kind == "chars" or not held_out(document.id, args.data.held_out)
    )
    if kind == "chars":
        return train_chars(texts)
    try:
        return train_bpe(texts, args.tokenizer.vocab_size)
    except RequestError as error:
        field = "tokenizer." if str(error).startswith("vocab_size") else ""
        raise RequestError(f"{field}{error}") from None


def open_corpora(args: TrainArgs, tokenizer: Tokenizer, *, quiet: bool) -> dict[str, Corpus]:
    """Token files of every source by name, with what was skipped said in one line each."""
    out: dict[str, Corpus] = {}
    for source in args.data.source_list:
        corpus = prepare(
            source, tokenizer, args.data.cache_dir, held_out_fraction=args.data.held_out, progress=not quiet
        )
        if source.label in out:
            raise RequestError(f"data.sources: {source.label!r} twice; accepted is one entry each, with a weight")
        out[source.label] = corpus
        if not quiet:
            notice(describe_corpus(source, corpus))
    return out


def describe_corpus(source: SourceArgs, corpus: Corpus) -> str:
    """One line: what was read, held out and left out."""
    kept, rest = corpus.train, corpus.held_out
    left_out = {
        name.replace("_", " "): count
        for name, count in vars(corpus.report).items()
        if count and name not in ("files", "documents")
    }
    if corpus.unknown_tokens:
        left_out["places the vocabulary cannot write"] = corpus.unknown_tokens
    more = "".join(f", {count} {name}" for name, count in left_out.items())
    return (
        f"{source.label}: {len(kept)} documents, {len(kept.tokens):,} tokens to train on; "
        f"{len(rest)} documents, {int(rest.bytes.sum()):,} bytes held out{more}"
    )


def write_run(run: Path, trainer: Trainer) -> None:
    """config.yaml and run.json: all that is needed to know what this run was."""
    args, config = trainer.args, trainer.args.to_dict()
    write_text(run / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip())
    facts: dict[str, Any] = {
        "transom": __version__,
        "machine": machine(),
        "device": trainer.device.type,
        "dtype": str(trainer.dtype).removeprefix("torch."),
        "parameters": parameters(trainer.model.args),
        "steps": args.steps,
        "seed": args.seed,
        "data": dict(trainer.data_hashes),
        "tokenizer": trainer.tokenizer.hash,
        "model": trainer.model.args.to_dict(),
        "config": config,
    }
    write_text(run / "run.json", json.dumps(facts, indent=2))


def check_same_run(run: Path, args: TrainArgs) -> None:
    """Refuse to resume a run with a config that would compute something else."""
    if not (run / "config.yaml").exists():
        raise RequestError(f"{run}: no config.yaml; accepted with --resume is a folder that a run wrote")
    before = read_config(run / "config.yaml")
    for field in fields(TrainArgs):
        ours, theirs = getattr(args, field.name), getattr(before, field.name)
        if field.name == "data":  # where shards are kept is no part of the data
            theirs = replace(theirs, cache_dir=ours.cache_dir)
        if field.name not in FREE_ON_RESUME and ours != theirs:
            raise RequestError(
                f"{run}: belongs to another run: its {field.name} is {theirs!r}, the config says {ours!r}"
            )


def check_same_machine(run: Path, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The run's own dtype, which a new measurement must not change; says what makes resuming inexact."""
    facts, now = read_json(run / "run.json"), machine()
    for what, before, after in (
        ("device", facts["device"], device.type),
        *((name, facts["machine"][name], now[name]) for name in ("torch", "threads", "processor")),
    ):
        if before != after:
            notice(f"{run}: {what} was {before}, is {after}: losses may differ in their last bits")
    return DTYPES.get(facts["dtype"], dtype)


def check_same_data(run: Path, data: dict[str, str], tokenizer: Tokenizer) -> None:
    """Refuse to resume on text that has changed: the data position would point elsewhere."""
    facts = read_json(run / "run.json")
    if facts["data"] != data:
        changed = [name for name in data if facts["data"].get(name) != data[name]]
        raise RequestError(
            f"{run}: the text of {', '.join(changed)} has changed since the run began; start a new run"
        )
    if facts["tokenizer"] != tokenizer.hash:
        raise RequestError(f"{run}: the tokenizer of its latest step is not the one it began with")
