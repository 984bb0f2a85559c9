"""KV caches: static and rotating stores with one contract, and the caches of all layers."""
