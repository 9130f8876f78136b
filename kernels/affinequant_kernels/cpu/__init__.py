"""The fast path on a CPU: ways to multiply integers, the choice among them, and code compiled on this machine."""
