"""The language model, the image encoder, and image preprocessing."""
