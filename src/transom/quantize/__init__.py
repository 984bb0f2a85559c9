"""Weights of a frozen base in four bits: the formats, the leaves that hold them, and the
surgery.
"""
