"""Frozen weights in four bits: the formats, and the leaves that use them."""
