"""`python -m affinequant`."""

import sys

from affinequant.cli import main

if __name__ == "__main__":
    sys.exit(main())
