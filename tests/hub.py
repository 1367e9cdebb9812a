"""A model hub of one's own on this machine: what huggingface_hub asks of one to download a repository, and nothing else."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "1" * 40


@contextmanager
def serve(folder: Path, repository: str) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as `repository`; yields the hub's address and a list that grows by every file that is fetched."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
    tree = [{"type": "file", "path": name, "size": len(body), "oid": COMMIT} for name, body in files.items()]
    fetched: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, whole: bool) -> None:
            path = self.path.partition("?")[0]
            name = path.partition("/resolve/")[2].partition("/")[2]
            if path.startswith(f"/api/models/{repository}"):
                self._send(json.dumps(tree if "/tree/" in path else info).encode(), "application/json", whole)
            elif path.startswith(f"/{repository}/resolve/") and name in files:
                fetched.extend([name] if whole else [])
                self._send(files[name], "application/octet-stream", whole)
            else:
                self._send(b"{}", "application/json", whole, 404)

        def _send(self, body: bytes, kind: str, whole: bool, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if whole:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
