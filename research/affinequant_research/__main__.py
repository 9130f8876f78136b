"""`python -m affinequant_research list|run ...` is `affinequant research list|run ...`."""

import sys

from affinequant.cli import main

if __name__ == "__main__":
    sys.exit(main(["research", *sys.argv[1:]]))
