"""The files beside the weights of a model: tokenizer, chat templates, licence, labels."""

from __future__ import annotations

import shutil
from pathlib import Path

from transom.checkpoints.files.generation_config import GENERATION
from transom.checkpoints.files.layout import TOKENIZERS
from transom.checkpoints.files.pooling import SENTENCE_TRANSFORMERS
from transom.tokenizers.folder import TEMPLATES

TOKENIZER_FILES = (
    *(*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja")
TRAINED_WITH = "trained_with.json"
_COMPANIONS = (
    *(*TOKENIZER_FILES, *TEMPLATE_FILES, TRAINED_WITH, GENERATION, *SENTENCE_TRANSFORMERS),
    *("labels.json", "preprocessor_config.json", "processor_config.json"),
    *("LICENSE", "LICENSE.txt", "USE_POLICY.md"),
)


def copy_companions(source: Path, out: Path) -> list[str]:
    """Copy the files beside the weights of a model; return their names relative to `source`."""
    found = {path for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()}
    names = sorted(path.relative_to(source).as_posix() for path in found)
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, out / name)
    return names
