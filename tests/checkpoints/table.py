"""The table of families in docs, made of what the tests compare: `python -m
tests.checkpoints.table` writes it.
"""

from __future__ import annotations

from pathlib import Path

from tests.checkpoints.adapters.twins import ADAPTERS
from tests.checkpoints.consolidated import MISTRAL_PARAMS, PARAMS
from tests.checkpoints.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "checkpoints.md"
BEGIN, END = (
    "<!-- families: written by `python -m tests.checkpoints.table` -->\n",
    "<!-- end of families -->\n",
)
# model_type: what people call it
NAMES = {
    "llama": "Llama 2, 3, 3.x",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen 2, 2.5",
    "qwen3": "Qwen 3",
    "qwen3_moe": "Qwen 3, mixture of experts",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text",
    "olmo2": "OLMo 2",
    "phi3": "Phi-3",
    "llama4_text": "Llama 4, text",
    "llama4": "Llama 4 with vision",
    "gpt_oss": "gpt-oss",
    "deepseek_v3": "DeepSeek-V3",
}
# What a twin has that the usual one of its family has not.
VARIANTS = {
    "tied": "tied output",
    "linear": "linear scaling",
    "dynamic": "dynamic scaling",
    "raw": "shares of experts as they are",
    "longrope": "LongRoPE",
    "plain": "queries without a latent",
}
META = {"llama2": "llama", "llama3": "llama", "llama4": "llama4_text", "llama4-vision": "llama4"}


def family_of(twin: str) -> str:
    """`phi3-longrope` is a twin of phi3."""
    return twin.partition("-")[0]


def rows() -> list[tuple[str, ...]]:
    """One row per family: name, model_type, variants compared, and the other files it is compared
    from.
    """
    meta = {META[kind] for kind in PARAMS}
    mistral = {"mixtral" if "moe" in params else "mistral" for params in MISTRAL_PARAMS.values()}
    adapters = {family_of(twin) for twin, _ in ADAPTERS.values()}
    out = []
    for family in dict.fromkeys(map(family_of, FAMILIES)):
        variants = [
            VARIANTS[twin.partition("-")[2]]
            for twin in FAMILIES
            if family_of(twin) == family and "-" in twin
        ]
        marks = ["yes" if family in known else "" for known in (meta, mistral, adapters)]
        out.append((NAMES[family], f"`{family}`", ", ".join(variants), *marks))
    return out


def table() -> str:
    """The table in Markdown, a line end behind its last row."""
    head = ("family", "`model_type`", "compared with and without", "Meta", "Mistral", "adapters")
    lines = [head, ("---",) * len(head), *rows()]
    return "".join(
        "|".join(["", *(f" {cell} " if cell else " " for cell in line), "\n"]) for line in lines
    )


def written(readme: str) -> str:
    """Return the page with the current table between its markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
