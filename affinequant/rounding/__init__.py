"""From real weights to codes: the ways to round, and the pass over a block that is being rounded."""
