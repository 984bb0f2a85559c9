"""The parts of a block: leaves, norms, rotary positions, attention, feed-forward, mixture of
experts.
"""
