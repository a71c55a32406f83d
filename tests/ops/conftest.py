"""Let the tests of the ops share their case lists, which are no package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
