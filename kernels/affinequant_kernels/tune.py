"""`python -m affinequant_kernels.tune`: the search of `bench/search.py`."""

import sys

from affinequant_kernels.bench.search import main

if __name__ == "__main__":
    sys.exit(main())
