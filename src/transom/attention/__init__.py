"""Attention: one rule, a float64-capable reference, and backends that must equal it."""
