"""A Hugging Face hub on this machine: serves checkpoint folders and fails as the real one does."""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOT_FOUND = 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}
REFUSALS = {
    "org/gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}),
    "org/disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}),
    "org/forbidden": (403, {"X-Error-Message": "Please enable access to public gated repositories."}),
    "org/limited": (429, {}),
    "org/busy": (503, {}),
}
"""Hub id -> the status and headers of every answer about it."""


class Hub:
    """`folders` are served by hub id, at the revision main, which is the last of `commits`, and at all of these;
    `asked` counts the requests (method, id, file)."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders, self.asked = folders, Counter[tuple[str, str, str]]()
        self.commits = [COMMIT]
        self.passing = {"org/blip"}  # ids whose first answer is a 503

    def answer(self, method: str, repo: str, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        self.asked[method, repo, name] += 1
        if repo in self.passing:
            self.passing.remove(repo)
            return 503, {}, b""
        if repo not in self.folders:
            return *REFUSALS.get(repo, NOT_FOUND), b""
        if revision not in ("main", *self.commits):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit = self.commits[-1] if revision == "main" else revision
        file = self.folders[repo] / name
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        data = file.read_bytes()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: Hub, *arguments: object) -> None:
        self.hub = hub
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.removeprefix("/api/models")
        owner, model, _, revision, name = [*path.removeprefix("/").split("/", 4), *[""] * 4][:5]
        repo = f"{owner}/{model}"
        status, headers, data = self.hub.answer(self.command, repo, revision, name)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The URL of the hub, for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, hub))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
