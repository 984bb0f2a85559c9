"""Chat templates: messages to text and token ids, rendered in a sandbox, and built-in templates."""
