"""Continuing token rows: how a next token is chosen, the one loop that asks for it, and the text it
becomes.
"""
