"""Prefill of a second turn: a stored prefix, in memory and in a file, beside a cold prefill."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import interleaved
from transom.cache.prefix import PrefixCache
from transom.checkpoints.save import save
from transom.config.model_args import ModelArgs
from transom.inference.decode_args import DecodeArgs
from transom.inference.forward import prefill
from transom.inference.prompt_cache import PromptCache
from transom.models.llm import LLM

FIRST, ANSWER, NEW, STEP = 4096, 64, 256, 512  # tokens; the answer is not part of the second turn
WINDOW = 512
SHAPE: dict[str, Any] = {
    "dim": 384,
    "n_layers": 6,
    "n_heads": 6,
    "n_kv_heads": 2,
    "hidden_dim": 1024,
    "vocab_size": 1024,
    "max_seq_len": 8192,
}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "window of 512": {"sliding_window": WINDOW},
    "hybrid, 5 windows of 512 to 1 full": {"sliding_window": WINDOW, "layer_pattern": "SSSSSF"},
}
Program = Callable[[list[int]], object]  # prefills a prompt
DTYPE = torch.float32


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per kind of layers and way to prefill: seconds of the second turn."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(1024, (FIRST + ANSWER,), generator=generator).tolist()
    made = []
    for name, changes in CASES.items():
        model = LLM(ModelArgs.from_dict({**SHAPE, **changes}))
        model.init_weights(0)
        model.to(device, DTYPE).eval()
        with tempfile.TemporaryDirectory() as scratch:
            peer = f"{name}: cold prefill"
            programs = {peer: partial(run, model)}
            programs |= _stored(model, name, first[:FIRST], Path(scratch))
            programs |= _transformers(model, name, first, Path(scratch) / "hf")

            def second_turn(program: Program) -> object:  # other new tokens each time
                new = torch.randint(1024, (NEW,), generator=generator).tolist()
                return program([*first[:FIRST], *new])

            calls = {one: partial(second_turn, program) for one, program in programs.items()}
            seconds = interleaved(calls, device, rounds=3)
        made += [
            {
                "benchmark": "prefix cache",
                "case": one,
                "peer": peer,
                "seconds": round(value, 4),
                "percent_of_cold": round(100 * value / seconds[peer], 1),
                "ratio": round(seconds[peer] / value, 2),
            }
            for one, value in seconds.items()
        ]
    return made


@torch.inference_mode()
def run(model: LLM, prompt: list[int], prefixes: PrefixCache | None = None) -> None:
    """Prefill a prompt after its stored prefix, if there is one."""
    cache = model.make_cache(1, FIRST + ANSWER + NEW)
    count = 0 if prefixes is None else prefixes.restore(cache, [prompt])[0]
    prefill(model, cache, [prompt[count:]], STEP)


def _stored(model: LLM, name: str, first: list[int], scratch: Path) -> dict[str, Program]:
    memory, file = PrefixCache(model.args), DecodeArgs(prompt_cache_file=str(scratch / "prompt"))
    for prefixes in (memory, PromptCache(model, file)):
        run(model, first, prefixes)

    def from_file(prompt: list[int]) -> None:
        run(model, prompt, PromptCache(model, file))

    return {
        f"{name}: prefix in memory": partial(run, model, prefixes=memory),
        f"{name}: prefix in a file": from_file,
    }


def _transformers(model: LLM, name: str, first: list[int], folder: Path) -> dict[str, Program]:
    """Return transformers with a cache that records what it forgets, so that it can be cropped."""
    from transformers import AutoModelForCausalLM, DynamicCache

    if model.args.layer_pattern is not None:
        return {}  # no family of transformers has this pattern and nothing else
    save(model, folder, format="hf")
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(model.device)
    cache = DynamicCache(config=peer.config)

    @torch.inference_mode()
    def append(prompt: list[int]) -> None:
        for piece in torch.tensor([prompt], device=model.device).split(STEP, 1):
            peer(piece, cache=cache, logits_to_keep=1)

    def again(prompt: list[int]) -> None:
        cache.crop(FIRST - cache.get_seq_length())
        cache.activate_past_recording()
        append(prompt[FIRST:])

    append(first[:FIRST])
    cache.activate_past_recording()
    append(first[FIRST:])
    return {f"{name}: transformers, cropped cache": again}
