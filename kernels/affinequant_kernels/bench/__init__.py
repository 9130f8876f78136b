"""Programs about the kernels: the benchmark, the search for configurations, checks of the machine code."""
