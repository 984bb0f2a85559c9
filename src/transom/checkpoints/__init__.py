"""Folders of weights: which one is meant, what is in it, and every key accounted for."""
