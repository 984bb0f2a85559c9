"""What a model is worth and what it does inside: measurements on finished models."""
