"""Frozen weights in four or eight bits: the formats, and the leaves that use them."""
