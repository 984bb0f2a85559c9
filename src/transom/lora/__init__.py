"""Low-rank adapters on a built model: maths only, no files."""
