"""Rotations as networks give them: which representations are continuous, and what that is worth (arXiv 1812.07035)."""
