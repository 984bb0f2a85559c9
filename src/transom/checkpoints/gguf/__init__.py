"""GGUF files of llama.cpp as models: the container, its metadata as a config, its tensors."""
