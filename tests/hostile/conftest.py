"""The attacks are a package beside these tests: `hostile`, also run as `python tests/hostile/table.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
