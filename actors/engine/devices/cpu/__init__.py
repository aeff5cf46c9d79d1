"""The CPU: a contiguous KV cache, compiled attention and experts, packed layers."""
