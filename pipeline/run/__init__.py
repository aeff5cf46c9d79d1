"""One run of a job: its session, its Ray cluster and pipeline stages, crashes, stopping, progress and outcome."""
