"""Errors, files, locks, strict fields and the runtime, which every other package may import."""
