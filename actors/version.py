"""The version of what a row's caption depends on beside the job spec and the checkpoint.

Raise `CAPTIONS` by hand whenever the same row would get other token ids, other tiles or another sampling order:
a change to a prompt, a tiler, a decoder or an engine that is meant to alter captions. An output written by another
version is then refused instead of being mixed; a change that alters nothing (it has its parity test) leaves it alone.
"""

CAPTIONS = 1
