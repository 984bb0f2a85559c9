"""Adapters: low-rank updates beside the weights of a built model, and what reads, merges and writes
them.
"""
