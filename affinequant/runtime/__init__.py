"""A checkpoint at work: loading it, its integer linears, its KV cache."""
