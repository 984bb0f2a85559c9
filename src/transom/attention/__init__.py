"""Attention: the mask rule, a reference in plain tensor operations, and backends."""
