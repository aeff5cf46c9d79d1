"""Files: local folders and object stores alike, atomic and conditional writes, retries, and the lease of an output."""
