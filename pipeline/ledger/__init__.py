"""Which rows are done: publishing, planning, sealing, verifying and retrying, told by the output's files alone."""
