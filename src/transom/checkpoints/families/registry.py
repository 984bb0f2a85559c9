"""All families of Hugging Face by `model_type`, and all ways in which files name weights. No
torch.
"""

from __future__ import annotations

from transom.checkpoints.families.deepseek import DEEPSEEK_V3
from transom.checkpoints.families.family import Family
from transom.checkpoints.families.gemma import GEMMA2, GEMMA3, GEMMA3_TEXT
from transom.checkpoints.families.gpt_oss import GPT_OSS
from transom.checkpoints.families.llama import LLAMA, MISTRAL, MIXTRAL, OLMO2, PHI3
from transom.checkpoints.families.llama4 import LLAMA4, LLAMA4_TEXT
from transom.checkpoints.families.meta_params import META_NAMES
from transom.checkpoints.families.mistral_params import MISTRAL_NAMES
from transom.checkpoints.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from transom.checkpoints.families.weights import WeightNames

# A model is written as the first family that can express it.
_FAMILIES = (
    *(LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, OLMO2, PHI3),
    *(GEMMA2, GEMMA3_TEXT, GEMMA3, GPT_OSS, LLAMA4_TEXT, LLAMA4, DEEPSEEK_V3),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _FAMILIES}
# By model_type, or `params_meta` and `params_mistral` for folders with a params.json.
WEIGHT_NAMES: dict[str, WeightNames] = {
    **{name: family.names for name, family in FAMILIES.items()},
    "params_meta": META_NAMES,
    "params_mistral": MISTRAL_NAMES,
}
