from __future__ import annotations

import sys
from pathlib import Path

# The experiments are scripts: like Python when it runs one, look for modules beside them.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
