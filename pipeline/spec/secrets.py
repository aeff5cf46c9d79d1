"""Credentials in URLs: a spec that holds one is refused, and wherever a URL is shown they are left out.

Why: a job's URLs are written to spec.json and to each run's record, and stand in logs and error messages, all of which
more people read than the storage. So credentials come from the environment and a URL has none: no `user:password@`, no
token before an `@`, no query string (`?X-Amz-Signature=...` and `?sig=...` are keys to the data they name).
"""

import re

WHERE_THEY_BELONG = (
    "holds credentials (user:password@, or a query string); take them out and give them to the storage through its "
    "environment or configuration (S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or an instance role; "
    "Azure: AZURE_STORAGE_SAS_TOKEN; the hub: HF_TOKEN)"
)

# A port ("host:9000/...") is no password, "::" joins URLs, and `github://organisation:repository@commit` is an address;
# "key:secret@" is one, even where the secret itself holds slashes. A "?" without a name and "=" is a glob's.
_PATTERNS = (
    (re.compile(r"(?<!github)://[^/\s@:'\"]*:(?!:|\d+(?:/|$))[^@\s'\"]*@"), "://...@"),
    (re.compile(r"(?<=http)(s?)://[^/\s@'\"]+@"), r"\1://...@"),
    # Of a web address all that follows a "?" is a query, whether it has names or not, and no glob
    (re.compile(r"(?<=http)(s?://[^\s?'\"]*)\?[^\s'\"]*?(?=[:;,.)\]]*(?:[\s'\"]|$))"), r"\1?..."),
    (re.compile(r"\?[A-Za-z][\w.%+-]*=[^\s'\"]*?(?=[:;,.)\]]*(?:[\s'\"]|$))"), "?..."),
)


def holds_credentials(url: str) -> bool:
    """Whether a URL, which may be chained (`simplecache::https://...`), has a password, a token or a query string."""
    text = "".join(url.split())
    return "://" in text and any(pattern.search(text) for pattern, _ in _PATTERNS)


def redacted(text: str) -> str:
    """The text without the credentials of URLs and paths in it.

    >>> redacted("cannot read https://me:hush@host/a.parquet?sig=hush&se=1: 403")
    'cannot read https://...@host/a.parquet?...: 403'
    """
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text
