"""What the words of a plan mean, one line each."""

from __future__ import annotations

from transom.planning.layer_plan import ModelPlan

# Said only of plans in which the word occurs.
MEANINGS = (
    ("causal", "a token sees itself and everything before it"),
    (
        "window",
        "a token sees itself and the tokens just before it, N in all; N is the number shown",
    ),
    (
        "chunk",
        "the text is cut into chunks of N tokens; a token sees itself and what precedes it in "
        "its own",
    ),
    ("full", "a token sees the whole text, later tokens too"),
    ("RoPE", "order is told by rotating queries and keys; the longest wavelength grows with theta"),
    ("scaled", "long wavelengths are stretched by this factor, so that longer texts fit"),
    ("capped", "scores go through cap * tanh(score / cap), so that none grows without bound"),
    ("sinks", "one learned score per head that takes attention and gives nothing"),
    ("context", "every block also attends to a sequence of that width from elsewhere"),
    ("NoPE", "no positions; order is known from the other layers"),
    ("temperature", "queries are scaled up far into a text, so that attention stays sharp"),
    ("heads", "query heads / key and value heads (what the cache holds) x features per head"),
    (
        "latent",
        "all heads share one small vector per token and a rotary key: width of both, and all "
        "that is cached",
    ),
    ("QK-norm", "queries and keys are normalised before they are compared"),
    ("SwiGLU", "gated feed-forward of that width"),
    ("GeGLU", "the same with GELU as its gate"),
    (
        "MoE",
        "experts x width; a router sends a token to the top few: softmax and biased_sigmoid "
        "weight their output, sigmoid their input",
    ),
    ("shared", "one more expert that every token visits"),
    (
        "KV bytes/token",
        "memory one more token of context takes, in bfloat16; full windows and chunks take no more",
    ),
    (
        "FLOPs",
        "multiplications and additions of the matrix products, forward in the table; training is "
        "three times",
    ),
)


def legend(planned: ModelPlan) -> list[tuple[str, str]]:
    """(word, meaning) for the words that occur in this plan."""
    used = {"heads", "KV bytes/token", "FLOPs"}
    for layer in planned.layers:
        used |= {"QK-norm"} if layer.qk_norm else set()
        used |= set(
            f"{layer.attention} {layer.positions} {layer.heads} {layer.feed_forward}".split()
        )
    lines = [(word, meaning) for word, meaning in MEANINGS if word in used]
    return [*lines, ("equal layers", "are shown once; the numbers are those of one of them")]
