"""Read by every Python that starts with this folder on PYTHONPATH: lets tests/chaos/faults.py in, where asked to."""

import os

if "TESSERA_CHAOS" in os.environ:
    from tests.chaos import faults

    faults.install(os.environ["TESSERA_CHAOS"])
