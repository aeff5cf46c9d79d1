"""What runs inside Ray actors.

transformers imports torchvision wherever it finds it, and every model import fails when that torchvision was
built for another torch. Tessera resizes with core torch and needs none, so torchvision is hidden here, before
transformers looks for it (`None` in `sys.modules` is Python's way to say "not installed"). A process that imported
torchvision before `actors` keeps it: so do the tests that use it as their oracle. So does one that imported
transformers: it may have looked already, and would miss what it saw.
"""

import sys

if "transformers" not in sys.modules:
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
