"""What differs between devices: KV caches, attention kernels, layers, memory."""
