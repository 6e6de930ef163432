"""A stand-in for the Hugging Face Hub: what `huggingface_hub` asks for when it makes a repository and commits to it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """One user's repositories."""

    token: str
    private: dict[str, bool] = field(default_factory=dict)
    """By repository."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """Method and path of each, in order."""
    refuses: tuple[str, ...] = ()
    """Ends of paths that are answered with an error, which repeats the token."""
    endpoint: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status, and what is sent as JSON."""
        if path.endswith(self.refuses or ("\0",)):
            return 403, {"error": f"no, {self.token}"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        repo, _, rest = path.removeprefix("/api/models/").partition("/preupload/")
        if rest:
            asked = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        repo, _, rest = path.removeprefix("/api/models/").partition("/commit/")
        if rest:
            return self._commit(repo, body)
        if repo in self.files:
            names = [{"rfilename": name} for name in self.files[repo]]
            return 200, {"id": repo, "private": self.private[repo], "siblings": names, "tags": [], "downloads": 0}
        return 404, {"error": "not found"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = repo in self.files
        self.files.setdefault(repo, {})
        self.private.setdefault(repo, asked.get("visibility") == "private" or bool(asked.get("private")))
        return (409 if known else 200), {"url": f"{self.endpoint}/{repo}", "name": repo, "id": repo}

    def _commit(self, repo: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.files[repo][value["path"]]
        oid = "1" * 40
        return 200, {"commitUrl": f"{self.endpoint}/{repo}/commit/{oid}", "commitOid": oid}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Answers at `hub.endpoint`, and only to requests with its token."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                status, value = 401, {"error": "Invalid username or password."}
            else:
                status, value = hub.answer(self.command, path, body)
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
