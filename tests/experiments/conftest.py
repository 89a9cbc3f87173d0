from __future__ import annotations

import sys
from pathlib import Path

from tests.tape.conftest import device, forbid_moves

__all__ = ["device", "forbid_moves"]

# The experiments are scripts: like Python when it runs one, look for modules beside them.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
