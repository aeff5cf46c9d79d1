"""The job as one validated model, and the sentences that say what is wrong with one."""
