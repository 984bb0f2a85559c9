"""The parts of a block: leaves, norms, RoPE, attention, feed-forward, mixture of experts."""
