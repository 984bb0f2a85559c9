"""Messages to text and ids: a model's own template in a sandbox, and templates for folders without
one.
"""
