"""What `ray job submit --working-dir . -- python -m jobs.caption JOB.yaml` runs: `tessera run`, as a module.

The exit code is the job's own (see jobs/cli.py), so a submitted job FAILS exactly when the command would.
"""

from __future__ import annotations

import sys

from jobs.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
