"""`python -m affinequant_kernels.aot`: the checks of `bench/aot.py`."""

import sys

from affinequant_kernels.bench.aot import main

if __name__ == "__main__":
    sys.exit(main())
