"""Generation, embeddings and chat sessions with a model."""
