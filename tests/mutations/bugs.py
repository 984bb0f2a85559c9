"""The registry of known silent bugs: nothing crashes, but the numbers are wrong.

Each bug names the check of `transom verify` that must fail while the bug is planted. New work adds
its own rows here; `python -m tests.mutations.table` then updates docs/verify.md.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tests.mutations import (
    checkpoint_bugs,
    export_bugs,
    finetune_bugs,
    merge_bugs,
    model_bugs,
    ops_bugs,
    parallel_bugs,
    quantize_bugs,
    run_bugs,
)
from transom.verify.checks import run
from transom.verify.findings import Finding


@dataclass(frozen=True)
class Bug:
    """A bug that is present inside the context of `plant`, and the check that must fail there."""

    name: str
    check: str
    plant: Callable[[], AbstractContextManager[None]]

    @property
    def what(self) -> str:
        """The first sentence of the docstring of `plant`."""
        assert self.plant.__doc__, "every plant has a docstring"
        return " ".join(self.plant.__doc__.split()).rstrip(".")


BUGS: tuple[Bug, ...] = (
    Bug("window off by one", "cache", model_bugs.wide_window),
    Bug("window off by one everywhere", "model", model_bugs.wide_window_everywhere),
    Bug("chunk counted from the call", "cache", model_bugs.chunk_from_the_call),
    Bug("padding key visible", "cache", model_bugs.visible_padding),
    Bug("leaking segment", "cache", model_bugs.leaking_segment),
    Bug("RoPE scaling dropped", "model", model_bugs.unscaled_rope),
    Bug("YaRN factor dropped", "model", model_bugs.unfactored_yarn),
    Bug("RoPE layout swapped", "model", model_bugs.swapped_layout),
    Bug("RoPE in a NoPE layer", "model", model_bugs.rotated_nope),
    Bug("QK-norm after RoPE", "model", model_bugs.norm_behind_rotation),
    Bug("temperature counts padding", "cache", model_bugs.padded_temperature),
    Bug("GQA heads tiled", "model", model_bugs.tiled_heads),
    Bug("norm weight dropped", "model", model_bugs.weightless_norm),
    Bug("softcap dropped", "model", model_bugs.uncapped_scores),
    Bug("sinks dropped", "model", model_bugs.sinkless_scores),
    Bug("softmax scale dropped", "model", model_bugs.unscaled_scores),
    Bug("logits not capped", "model", model_bugs.uncapped_logits),
    Bug("latent decoding without RoPE", "cache", model_bugs.latent_without_rotation),
    Bug("tied output untied", "model", model_bugs.untied_output),
    Bug("expert output scaled", "model", model_bugs.scaled_output),
    Bug("router weights renormalised", "model", model_bugs.renormalized_router),
    Bug("choice bias in the weights", "model", model_bugs.weighing_bias),
    Bug("stale ring slot", "cache", run_bugs.stale_slot),
    Bug("scale of another token", "cache", run_bugs.stale_scale),
    Bug("prefill chunk overwrites", "cache", run_bugs.overwriting_prefill),
    Bug("static view cut short", "cache", run_bugs.short_view),
    Bug("snapshot one token short", "cache", run_bugs.short_snapshot),
    Bug("prefix one token long", "cache", run_bugs.longer_prefix),
    Bug("proposals accepted unseen", "cache", run_bugs.unverified_proposals),
    Bug("window slice off by one", "attention", model_bugs.wide_slices),
    Bug("NaN from a masked row", "attention", model_bugs.nan_in_masked_rows),
    Bug("partial block lost", "attention", model_bugs.lost_partial_block),
    Bug("scale of the wrong group", "ops", ops_bugs.neighbouring_scale),
    Bug("order of columns ignored", "ops", ops_bugs.ignored_order),
    Bug("value of the wrong code", "ops", ops_bugs.neighbouring_level),
    Bug("plan without windows", "ops", ops_bugs.unlimited_plan),
    Bug("mean of the means of ranks", "parallel", parallel_bugs.mean_of_means),
    Bug("gradient norm of one rank", "parallel", parallel_bugs.norm_of_one_rank),
    Bug("positions of one context rank", "parallel", parallel_bugs.positions_from_zero),
    Bug("pieces of a row swapped", "parallel", parallel_bugs.pieces_swapped),
    Bug("outputs of experts to wrong tokens", "parallel", parallel_bugs.unsorted_return),
    Bug("gradients of tensor ranks apart", "parallel", parallel_bugs.own_gradients_of_norms),
    Bug("softmax of one tensor rank", "parallel", parallel_bugs.softmax_of_own_rows),
    Bug("Muon on parts of matrices", "parallel", parallel_bugs.parts_orthogonalised),
    Bug("shared embeddings of stages apart", "parallel", parallel_bugs.own_gradients_of_embeddings),
    Bug("group off by one", "quantize", quantize_bugs.shifted_groups),
    Bug("weight with another group's scale", "quantize", quantize_bugs.scale_before),
    Bug("zero point sign", "quantize", quantize_bugs.added_zeros),
    Bug("zero point sign in a file", "quantize", quantize_bugs.stored_sign),
    Bug("act-order ignored", "quantize", quantize_bugs.plain_order),
    Bug("decode off by one", "export", export_bugs.late_positions),
    Bug("scales not planned", "memory", export_bugs.uncounted_scales),
    Bug("double BOS", "data", run_bugs.double_bos),
    Bug("EOS masked", "data", run_bugs.masked_eos),
    Bug("per-rank mean loss", "step", run_bugs.mean_of_means),
    Bug("temperature ignored in training", "policy", run_bugs.cold_learning),
    Bug("answer off by one", "policy", run_bugs.shifted_answers),
    Bug("data state lost", "resume", run_bugs.lost_data_state),
    Bug("optimizer state lost", "resume", run_bugs.lost_optimizer_state),
    Bug("average restarted", "resume", run_bugs.restarted_average),
    Bug("random state lost", "resume", run_bugs.lost_random_state),
    Bug("permuted q", "checkpoint", checkpoint_bugs.permuted_query),
    Bug("q not permuted", "checkpoint", checkpoint_bugs.unturned_query),
    Bug("untied output", "checkpoint", checkpoint_bugs.untied_reading),
    Bug("swapped gate and value", "checkpoint", checkpoint_bugs.swapped_widths),
    Bug("dropped bias", "checkpoint", checkpoint_bugs.dropped_bias),
    Bug("double BOS in a chat", "checkpoint", checkpoint_bugs.double_bos_in_a_chat),
    Bug("spelled token becomes a token", "checkpoint", checkpoint_bugs.obeyed_spelling),
    Bug("merged on the wrong base", "merge", merge_bugs.other_base),
    Bug("wrong base accepted", "merge", merge_bugs.unchecked_base),
    Bug("merge without the scale", "merge", merge_bugs.forgotten_scale),
    Bug("merge transposed", "merge", merge_bugs.transposed_update),
    Bug("merged in half precision", "merge", merge_bugs.half_sum),
    Bug("unmerged by subtracting", "merge", merge_bugs.subtracted_update),
    Bug("end of turn masked", "finetune", finetune_bugs.masked_end_of_turn),
    Bug("padding that is EOS masked", "finetune", finetune_bugs.masked_padding),
    Bug("mask off by one turn", "finetune", finetune_bugs.turn_too_early),
    Bug("mask off by one token", "finetune", finetune_bugs.token_too_late),
    Bug("weights of turns lost", "finetune", finetune_bugs.lost_weights),
    Bug("packed examples see each other", "finetune", finetune_bugs.seen_neighbours),
    Bug("experts without adapter", "finetune", finetune_bugs.bare_experts),
    Bug("base trained beside its adapter", "finetune", finetune_bugs.trained_base),
    Bug("frozen routers balanced", "finetune", finetune_bugs.balanced_base),
    Bug("rsLoRA scaled as LoRA", "finetune", finetune_bugs.plain_scale),
    Bug("DoRA's norm differentiated", "finetune", finetune_bugs.learning_length),
    Bug("reference with its adapter", "finetune", finetune_bugs.adapted_reference),
    Bug("adapter lost on resume", "finetune", finetune_bugs.lost_adapter),
)


def first_failure(bug: Bug) -> Finding | None:
    """Plant a bug, run its check, and return the first failed comparison; None if all pass."""
    with bug.plant():
        return next((finding for finding in run(bug.check) if not finding.ok), None)
