"""One packed forward pass of the unmodified transformers model."""
