"""A tiny model in a folder and tiny sets of rows, for tests of fine-tuning."""

import json
from pathlib import Path
from typing import Any

import transom
from tests.helpers import random_model, tiny_args
from transom.tokenizers.training import byte_tokenizer
from transom.training.config import TrainArgs, read_config

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Greece": "Athens",
    "Norway": "Oslo",
}
QUESTIONS = (
    "Capital of {}?",
    "What is the capital of {}?",
    "{}'s capital is?",
    "Name the capital of {}.",
)


def base_folder(folder: Path, format: str = "native", **changes: Any) -> Path:
    """A model of a few thousand weights over bytes."""
    tokenizer = byte_tokenizer()
    model = random_model(tiny_args(vocab_size=tokenizer.vocab_size, **changes), std=0.08)
    transom.save(model, folder, format=format, tokenizer=tokenizer)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(question: str, answer: str) -> list[dict[str, str]]:
    """One question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def chats(path: Path) -> Path:
    """Twenty conversations."""
    pairs = [(q.format(land), f"{city}.") for q in QUESTIONS for land, city in CAPITALS.items()]
    return write_rows(path, [{"messages": asked(*pair)} for pair in pairs])


def preferences(path: Path) -> Path:
    """Twenty pairs: the capital is chosen, another city rejected."""
    cities = list(CAPITALS.values())
    rows = []
    for at, question in enumerate(QUESTIONS):
        for index, land in enumerate(CAPITALS):
            wrong = cities[(index + at + 1) % len(cities)]
            prompt = question.format(land)
            rows.append({"prompt": prompt, "chosen": cities[index], "rejected": wrong})
    return write_rows(path, rows)


def judged(path: Path) -> Path:
    """Single answers, every second of which is wrong."""
    rows = [json.loads(line) for line in preferences(path).read_text().splitlines()]
    alone = [
        {
            "prompt": row["prompt"],
            "completion": row["chosen" if i % 2 else "rejected"],
            "label": bool(i % 2),
        }
        for i, row in enumerate(rows)
    ]
    return write_rows(path, alone)


def solved(path: Path) -> Path:
    """Twenty questions whose answer is known."""
    pairs = [(q.format(land), city) for q in QUESTIONS for land, city in CAPITALS.items()]
    return write_rows(path, [{"prompt": question, "answer": city} for question, city in pairs])


def letters(answer: str, reference: Any) -> float:
    """A reward: the share of letters and digits, which differs between answers."""
    return sum(one.isalnum() for one in answer) / max(1, len(answer))


def run_args(folder: Path, base: Path, data: Path, *overrides: str, **finetune: Any) -> TrainArgs:
    """A run of a second; `finetune` are fields of `FinetuneArgs`."""
    config: dict[str, Any] = {
        "out": str(folder / "run"),
        "base": str(base),
        "finetune": {
            **({} if finetune.get("method") == "full" else {"lora": {"rank": 4, "alpha": 8.0}}),
            **finetune,
        },
        "data": {"sources": [str(data)], "seq_len": 96, "batch_size": 4, "held_out": 0.2},
        "optimizer": {"lr": 0.01, "weight_decay": 0.0},
        "steps": 8,
        "save_every": 4,
        "threads": 1,
        "device": "cpu",
        "dtype": "float32",
    }
    return read_config(None, overrides, base=config)
