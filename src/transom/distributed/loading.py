"""A divided model from a folder: each rank allocates its parts only, and reads tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from transom.base.files import shown_name
from transom.checkpoints.files.checksums import verify_step
from transom.checkpoints.files.generation_config import stated_settings
from transom.checkpoints.load import count_nonfinite, warn_nonfinite
from transom.checkpoints.read_args import read_args
from transom.checkpoints.state import meta_model, open_parameters
from transom.distributed.parallelize import Division
from transom.models.llm import LLM


def load_parts(folder: Path, division: Division) -> LLM:
    """Return a model in float32 with this rank's parts of its weights.

    Args:
        folder: A model folder of any format. Quantized weights are dequantized.
        division: How the ranks divide the model.

    Raises:
        RequestError: The files are damaged or do not fit the config.
    """
    verify_step(folder)
    args = read_args(folder)
    model, source = meta_model(args), open_parameters(folder, args)
    division.divide(model)
    counts = {}
    for name, weight in model.named_parameters():
        full = source[name].read()
        counts[name] = count_nonfinite(full)
        division.fill(weight, full.to(weight.dtype))
    warn_nonfinite(counts, shown_name(folder))
    model.generation_settings = stated_settings((folder,))
    return model
