from __future__ import annotations

import sys
from pathlib import Path

# Tools are not installed; at the end of the path, so that an installed bminf is found first.
sys.path.append(str(Path(__file__).resolve().parents[2]))
