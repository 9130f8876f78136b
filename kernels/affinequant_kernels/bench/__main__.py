import sys

from affinequant_kernels.bench.benchmark import main

sys.exit(main())
