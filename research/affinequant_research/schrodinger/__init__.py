"""Schroedinger bridges through many snapshots with a reference that is refined on the way (SBIRR, arXiv 2408.06277)."""

from affinequant_research.experiment import Method
from affinequant_research.schrodinger import ecology, genes, repressilator, springs, vortex

METHOD = Method(
    name="schrodinger",
    about="dynamics out of snapshots, by bridges over a reference that is refined on them",
    source="arXiv 2408.06277",
    experiments=tuple(one.EXPERIMENT for one in (ecology, repressilator, vortex, genes, springs)),
)
