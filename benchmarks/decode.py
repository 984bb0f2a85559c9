"""Prefill and decoding beside llama.cpp and transformers, at 16, 8 and 4 bits.

The models are SmolLM2-135M and a random Llama of 1.1 B parameters. llama.cpp and Transom open the
same GGUF file, which `convert` writes. transformers computes in bfloat16, or in float32 where that
is faster. `python -m benchmarks decode:1b,Q8_0` measures the cases whose names contain both words.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tests.llama_cpp import LlamaCpp
from transom.base.runtime import bfloat16_is_fast
from transom.checkpoints.convert import convert
from transom.checkpoints.describe_model import DescribedModel
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.config.model_args import ModelArgs
from transom.inference.loop import stream
from transom.inference.speed import open_or_draw

FILES = Path(tempfile.gettempdir()) / "transom-benchmarks"  # models stay there for the next run
BITS = {"16 bits": "float16", "Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_1": "q4_1"}
LARGE = ModelArgs(
    dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632, vocab_size=32000
)
# Batch size, tokens of a prompt, new tokens, rounds after a short one to warm up.
CASES = {
    "SmolLM2": {
        "prefill of 512": (1, 512, 1, 3),
        "decode, batch 1": (1, 64, 33, 3),
        "decode, batch 8": (8, 16, 9, 3),
        "decode, batch 32": (32, 8, 6, 3),
    },
    "1b": {
        "prefill of 512": (1, 512, 1, 2),
        "decode, batch 1": (1, 16, 13, 2),
        "decode, batch 8": (8, 4, 6, 2),
        "decode, batch 32": (32, 2, 4, 2),
    },
}
# Continues prompts greedily by so many tokens, and calls the function after every step.
Program = Callable[[list[list[int]], int, Callable[[], None]], None]


def rows(device: torch.device, part: str = "") -> Iterator[dict[str, Any]]:
    """Yield one row per model, number of bits and case: tokens per second of every program."""
    words = [word.strip() for word in part.split(",")]
    for model, cases in CASES.items():
        for bits, dtype in BITS.items():
            names = [f"{what}, {bits}" for what in cases]
            if not any(all(word in f"{model}, {name}" for word in words) for name in names):
                continue
            file = _gguf(model, dtype)
            with _programs(file, model, dtype, device) as programs:
                for name, sizes in zip(names, cases.values(), strict=True):
                    if all(word in f"{model}, {name}" for word in words):
                        yield _row(model, name, file, programs, *sizes)


def _row(
    model: str, case: str, file: Path, programs: dict[str, Program], *sizes: int
) -> dict[str, Any]:
    batch, length, new, rounds = sizes
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, 30_000, (batch, length), generator=generator).tolist()
    with LlamaCpp(file, length + new, torch.get_num_threads(), batch) as peer:
        chosen = {"llama.cpp": partial(_llama_cpp, peer), **programs}
        seconds = _interleaved(chosen, prompts, new, rounds)
    rates = {}
    for name, times in seconds.items():
        first, later = zip(*((one[0], one[1:]) for one in times), strict=True)
        if new == 1:
            rates[name] = batch * length / statistics.median(first)
        else:
            rates[name] = batch / statistics.median(step for one in later for step in one)
    ours = rates["Transom"]
    row: dict[str, Any] = {"benchmark": f"generation: {model}", "case": case}
    row |= {f"{name}, tokens/s": round(rate, 1) for name, rate in rates.items()}
    row |= {f"ratio to {name}": round(ours / rate, 2) for name, rate in rates.items()}
    del row["ratio to Transom"]
    return row


def _interleaved(
    programs: dict[str, Program], prompts: list[list[int]], new: int, rounds: int
) -> dict[str, list[list[float]]]:
    """Return the seconds of every step, by program and round; the first step is the prefill."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in programs}
    for turn in range(1 + rounds):
        for name, program in list(programs.items())[:: 1 if turn % 2 else -1]:
            if not turn:
                program([row[:16] for row in prompts], min(new, 2), lambda: None)
                continue
            times = [time.perf_counter()]
            program(prompts, new, lambda times=times: times.append(time.perf_counter()))
            seconds[name].append([end - start for start, end in pairwise(times)][:new])
    return seconds


@contextmanager
def _programs(
    file: Path, model: str, dtype: str, device: torch.device
) -> Iterator[dict[str, Program]]:
    kept = dtype != "float16"
    half = "bfloat16" if bfloat16_is_fast(device.type) else "float16"
    ours = load(file, str(device), None if kept else half, keep_quantized=kept)
    programs: dict[str, Program] = {"Transom": partial(_transom, ours)}
    with ExitStack() as stack:
        if model == "SmolLM2":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            programs["transformers"] = partial(_transformers, _peer(Path(folder), device))
        yield programs


def _transom(model: Any, prompts: list[list[int]], new: int, tick: Callable[[], None]) -> None:
    for _ids in stream(model, prompts, max_new_tokens=new):
        tick()


def _llama_cpp(
    peer: LlamaCpp, prompts: list[list[int]], new: int, tick: Callable[[], None]
) -> None:
    for _ids in peer.steps(prompts, new):
        tick()


def _transformers(model: Any, prompts: list[list[int]], new: int, tick: Callable[[], None]) -> None:
    tokens = torch.tensor(prompts, device=model.device)

    def after_step(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tick()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        stopping_criteria=[after_step],
    )


def _peer(folder: Path, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    convert("smollm2", folder / "hf")
    dtype = torch.bfloat16 if bfloat16_is_fast(device.type) else torch.float32
    return AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype).to(device)


def _gguf(model: str, dtype: str) -> Path:
    """Return a GGUF file of a model, which is written when it is first needed."""
    file = FILES / f"{model}-{dtype}.gguf"
    if not file.exists():
        FILES.mkdir(exist_ok=True)
        convert("smollm2" if model == "SmolLM2" else _large(), file, dtype=dtype)
    return file


def _large() -> Path:
    """Return a folder with the random model, and the first tokens of SmolLM2's vocabulary."""
    folder = FILES / "1b-hf"
    if not folder.exists():
        torch.manual_seed(0)
        drawn = open_or_draw(DescribedModel("1b", LARGE, None), "cpu", "float16")
        save(drawn, folder)
        with tempfile.TemporaryDirectory() as scratch:
            convert("smollm2", Path(scratch) / "hf")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).write_text((Path(scratch) / "hf" / name).read_text())
        data = json.loads((folder / "tokenizer.json").read_text())
        kept = {word: id for word, id in data["model"]["vocab"].items() if id < LARGE.vocab_size}
        merges = [
            pair for pair in data["model"]["merges"] if "".join(pair).replace(" ", "") in kept
        ]
        data["model"] |= {"vocab": kept, "merges": merges}
        (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    return folder
