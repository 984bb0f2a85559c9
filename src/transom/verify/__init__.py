"""Comparisons of every fast path with a slow, obvious twin, on the machine where it will be
used.
"""
