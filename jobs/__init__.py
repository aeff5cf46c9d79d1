"""Entry points.

`pipeline` and `actors` are common names, and Python looks into the working folder first (`python -m`, `ray job submit
--working-dir`). So the two are imported here from beside this package, before a folder of that name can take their
place.
"""

import importlib
import sys
from pathlib import Path

_root = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, _root)
try:
    for _name in ("pipeline", "actors"):
        importlib.import_module(_name)
finally:
    sys.path.remove(_root)
