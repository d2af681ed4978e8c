"""`python -m snapshotd` is the command line."""

from __future__ import annotations

import sys

from snapshotd.cli import main

sys.exit(main())
