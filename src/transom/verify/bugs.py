"""Known silent bugs: nothing crashes, the numbers are just wrong. A later kind of work adds its own
rows.

The check named with each must turn red; a bug that no check sees is itself a bug.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from transom.verify import plants, plants_checkpoint, plants_merge, plants_runs, plants_tuning


@dataclass(frozen=True)
class Bug:
    """What goes wrong while the context of `plant` lasts, and the name of the check that must
    notice.
    """

    name: str
    check: str
    plant: Callable[[], AbstractContextManager[None]]

    @property
    def what(self) -> str:
        """What the plant says it does."""
        said = self.plant.__doc__
        assert said is not None, "every plant has a docstring"
        return said.rstrip(".")


BUGS: tuple[Bug, ...] = (
    Bug("window off by one", "cache", plants.wide_window),
    Bug("window off by one everywhere", "model", plants.wide_window_everywhere),
    Bug("chunk counted from the call", "cache", plants.chunk_from_the_call),
    Bug("padding key visible", "cache", plants.visible_padding),
    Bug("leaking segment", "cache", plants.leaking_segment),
    Bug("RoPE scaling dropped", "model", plants.unscaled_rope),
    Bug("YaRN factor dropped", "model", plants.unfactored_yarn),
    Bug("rotary layout swapped", "model", plants.swapped_layout),
    Bug("NoPE layer given rotary", "model", plants.rotated_nope),
    Bug("QK-norm on the wrong side", "model", plants.norm_behind_rotation),
    Bug("temperature counts padding", "cache", plants.padded_temperature),
    Bug("GQA heads tiled", "model", plants.tiled_heads),
    Bug("norm weight dropped", "model", plants.weightless_norm),
    Bug("softcap dropped", "model", plants.uncapped_scores),
    Bug("sinks dropped", "model", plants.sinkless_scores),
    Bug("softmax scale dropped", "model", plants.unscaled_scores),
    Bug("logits not capped", "model", plants.uncapped_logits),
    Bug("latent decoding without rotation", "cache", plants.latent_without_rotation),
    Bug("tied output untied", "model", plants.untied_output),
    Bug("expert output scaled", "model", plants.scaled_output),
    Bug("router weights renormalised", "model", plants.renormalized_router),
    Bug("choice bias in the weights", "model", plants.weighing_bias),
    Bug("stale ring slot", "cache", plants_runs.stale_slot),
    Bug("prefill chunk overwrites", "cache", plants_runs.overwriting_prefill),
    Bug("static view cut short", "cache", plants_runs.short_view),
    Bug("window slice off by one", "attention", plants.wide_slices),
    Bug("NaN from a masked row", "attention", plants.nan_in_masked_rows),
    Bug("partial block lost", "attention", plants.lost_partial_block),
    Bug("double BOS", "data", plants_runs.double_bos),
    Bug("EOS masked", "data", plants_runs.masked_eos),
    Bug("per-rank mean loss", "step", plants_runs.mean_of_means),
    Bug("temperature forgotten in learning", "policy", plants_runs.cold_learning),
    Bug("answer off by one", "policy", plants_runs.shifted_answers),
    Bug("data state lost", "resume", plants_runs.lost_data_state),
    Bug("optimizer state lost", "resume", plants_runs.lost_optimizer_state),
    Bug("average restarted", "resume", plants_runs.restarted_average),
    Bug("random state lost", "resume", plants_runs.lost_random_state),
    Bug("permuted q", "checkpoint", plants_checkpoint.permuted_query),
    Bug("q not turned", "checkpoint", plants_checkpoint.unturned_query),
    Bug("untied output", "checkpoint", plants_checkpoint.untied_reading),
    Bug("swapped gate and value", "checkpoint", plants_checkpoint.swapped_widths),
    Bug("dropped bias", "checkpoint", plants_checkpoint.dropped_bias),
    Bug("double BOS in a chat", "checkpoint", plants_checkpoint.double_bos_in_a_chat),
    Bug("spelled token obeyed", "checkpoint", plants_checkpoint.obeyed_spelling),
    Bug("merged on the wrong base", "merge", plants_merge.other_base),
    Bug("wrong base accepted", "merge", plants_merge.unchecked_base),
    Bug("merge without the scale", "merge", plants_merge.forgotten_scale),
    Bug("merge transposed", "merge", plants_merge.transposed_update),
    Bug("merged in half precision", "merge", plants_merge.half_sum),
    Bug("unmerged by subtracting", "merge", plants_merge.subtracted_update),
    Bug("end of turn masked", "tuning", plants_tuning.masked_end_of_turn),
    Bug("padding that is EOS masked", "tuning", plants_tuning.masked_padding),
    Bug("mask off by one turn", "tuning", plants_tuning.turn_too_early),
    Bug("mask off by one token", "tuning", plants_tuning.token_too_late),
    Bug("weights of turns lost", "tuning", plants_tuning.lost_weights),
    Bug("packed examples see each other", "tuning", plants_tuning.seen_neighbours),
    Bug("experts without adapter", "tuning", plants_tuning.bare_experts),
    Bug("base trained beside its adapter", "tuning", plants_tuning.trained_base),
    Bug("frozen routers balanced", "tuning", plants_tuning.balanced_base),
    Bug("rsLoRA scaled as LoRA", "tuning", plants_tuning.plain_scale),
    Bug("DoRA's norm differentiated", "tuning", plants_tuning.learning_length),
    Bug("reference with its adapter", "tuning", plants_tuning.adapted_reference),
    Bug("adapter lost on resume", "tuning", plants_tuning.lost_adapter),
)
