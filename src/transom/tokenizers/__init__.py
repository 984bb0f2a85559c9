"""Text to ids and back, whatever file the vocabulary lies in."""
