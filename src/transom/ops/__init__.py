"""Products in C++ that PyTorch lacks on the CPU, compiled on first use."""
