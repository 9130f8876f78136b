"""Multi-marginal Schroedinger bridges whose reference is refined (arXiv 2408.06277)."""
