"""`python -m affinequant`."""

from affinequant.cli import main

raise SystemExit(main())
