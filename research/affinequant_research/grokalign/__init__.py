"""GrokAlign: networks that generalise sooner because their Jacobians are made to align to their inputs (arXiv 2506.12284)."""

from affinequant_research.experiment import Method
from affinequant_research.grokalign import blocks, digits, inhibit, modular, robust, xor

METHOD = Method(
    name="grokalign",
    about="a penalty on Jacobians against delayed generalisation",
    source="arXiv 2506.12284",
    experiments=tuple(one.EXPERIMENT for one in (digits, xor, inhibit, robust, modular, blocks)),
)
