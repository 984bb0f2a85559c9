"""How a model runs while it generates.

Every field of `DecodeArgs` is an argument of `generate()` and a flag of `transom generate` and
`transom chat`. This module does not import torch, so that flags are read quickly.
"""

from __future__ import annotations

from dataclasses import dataclass

from transom.base.errors import expect
from transom.base.fields import check_bounds, describe
from transom.planning.memory import Workload

# Default limit of a conversation, in tokens: the maximum of some models would fill a GPU.
MAX_CONTEXT = 8192


@dataclass(frozen=True)
class DecodeArgs:
    """How a model runs while it generates. Only `kv_bits` changes logits, by rounding.

    Raises:
        RequestError: A value is out of its bounds.
    """

    prefill_step_size: int = describe(
        512,
        "prompt tokens per forward call; it limits memory, not the result",
        "tokens",
        at_least=1,
    )
    kv_bits: int = describe(
        16,
        "bits of the keys and values in the KV cache: 8 stores codes with a scale per token and "
        "head, in about half the memory; 16 stores the dtype of the model",
    )
    prompt_cache_file: str | None = describe(
        None,
        "file of prompt states: read, if it exists, for the beginnings that prompts share with it; "
        "otherwise written after the prefill",
        path=True,
    )
    max_model_len: int | None = describe(
        None,
        "tokens of prompt and answer together, or of a chat, at most (default: the model's "
        "maximum, and at most 8192 for a chat)",
        "tokens",
        at_least=2,
    )
    num_draft_tokens: int | None = describe(
        None,
        "tokens that a draft model proposes per call of the model (default: 4)",
        "tokens",
        at_least=1,
        at_most=32,
    )
    prompt_lookup_num_tokens: int | None = describe(
        None,
        "propose at most N tokens per call that followed the last ones earlier in the text",
        "tokens",
        at_least=1,
        at_most=32,
    )
    compile: bool = describe(
        False,
        "compile the steps after the prompt with torch.compile, and replay them as CUDA graphs on "
        "a CUDA device; the first steps take longer",
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        expect(self.kv_bits in (8, 16), "kv_bits", self.kv_bits, "8 or 16")

    def proposals(self, draft: object | None) -> int:
        """Return how many tokens are proposed per call at most, 0 without speculative decoding."""
        if draft is None:
            return self.prompt_lookup_num_tokens or 0
        return self.num_draft_tokens or 4

    def workload(self, rows: int, tokens: int, value_bytes: int, device_type: str) -> Workload:
        """Return what a request asks of memory, with numbers of `value_bytes` on a device."""
        native = device_type == "cpu" and value_bytes <= 4 and not self.compile
        sizes, joined = (rows, tokens, value_bytes), device_type != "cpu"
        return Workload(*sizes, self.kv_bits, self.prefill_step_size, native, joined)


DEFAULT = DecodeArgs()
