"""Key/value caches: static and rotating stores behind one contract, and the model's set of them."""
