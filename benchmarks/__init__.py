"""Benchmarks of speed and memory as ratios to peers that are measured in the same run.

The rows are in `rows.jsonl`, the page that is made of them in docs/benchmarks.md.
"""
