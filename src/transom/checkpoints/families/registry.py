"""All families of Hugging Face by `model_type`, and all ways in which files name weights. No
torch.
"""

from __future__ import annotations

from transom.checkpoints.families import deepseek, gemma, gpt_oss, llama, llama4, qwen
from transom.checkpoints.families.family import Family
from transom.checkpoints.families.meta_params import META_PARAMS
from transom.checkpoints.families.mistral_params import MISTRAL_PARAMS
from transom.checkpoints.families.weights import OUR_NAMES, WeightNames
from transom.checkpoints.files.layout import MODEL_TYPE
from transom.checkpoints.gguf.config import ARCHITECTURES
from transom.checkpoints.gguf.names import GGUF_NAMES, NAMES

# A model is written as the first family that can express it.
_GROUPS = (llama, qwen, gemma, gpt_oss, llama4, deepseek)
FAMILIES: dict[str, Family] = {
    family.model_type: family for group in _GROUPS for family in group.FAMILIES
}
# By the format of a folder with a params.json.
PARAMS_FAMILIES = {"meta": META_PARAMS, "mistral": MISTRAL_PARAMS}
_FOREIGN = (*FAMILIES.values(), *PARAMS_FAMILIES.values())
# By model_type, ours included, `params_meta` and `params_mistral` for folders with a params.json,
# and `gguf_` with the architecture of a GGUF file.
WEIGHT_NAMES: dict[str, WeightNames] = {
    MODEL_TYPE: OUR_NAMES,
    **{family.model_type: family.names for family in _FOREIGN},
    **{f"gguf_{name}": NAMES.get(name, GGUF_NAMES) for name in ARCHITECTURES},
}
