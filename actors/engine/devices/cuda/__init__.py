"""CUDA: a paged KV cache, flash attention and CUDA graphs."""
