"""A small Google Cloud Storage: the part of its JSON interface that TensorStore uses, in this process, in memory.

TensorStore is led here by its own variables for tests, ``TENSORSTORE_GCS_HTTP_URL`` and
``GOOGLE_AUTH_TOKEN_FOR_TESTING``, which it reads once in a process: one server serves all tests of a process and the
commands that they start.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "a-token"
_PAGE = 7  # names of a listing: a real one has 1,000


class Buckets:
    """What is stored.

    Attributes:
      objects: bucket -> name -> (content, generation); a bucket must be there before anything is stored in it.
      writes: ``bucket/name`` of everything that was stored, in order.
      read_only: buckets in which nothing may be stored.
      failing: requests that are still to be answered with 503, as of an overloaded service.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, tuple[bytes, int]]] = {}
        self.writes: list[str] = []
        self.read_only: set[str] = set()
        self.failing = 0
        self.lock = threading.Lock()
        self._generation = 0

    def contents(self, bucket: str, folder: str = "") -> dict[str, bytes]:
        """Names behind ``folder/``, and contents."""
        start = f"{folder}/" if folder else ""
        with self.lock:
            found = self.objects[bucket].items()
            return {name.removeprefix(start): content for name, (content, _) in found if name.startswith(start)}

    def put(self, bucket: str, name: str, content: bytes) -> int:
        self._generation += 1
        self.objects[bucket][name] = content, self._generation
        self.writes.append(f"{bucket}/{name}")
        return self._generation


@contextlib.contextmanager
def served() -> Iterator[tuple[Buckets, str]]:
    """Buckets, and the address at which they are served."""
    buckets = Buckets()
    handler = type("Handler", (_Handler,), {"buckets": buckets})
    server = _Server(("localhost", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield buckets, f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Whoever asked has been killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    buckets: Buckets

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        with self.buckets.lock:
            status, content, headers = self._respond(url.path, query, body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _respond(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        buckets = self.buckets
        if buckets.failing:
            buckets.failing -= 1
            return _refusal(503, "busy")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _refusal(401, "who are you?")
        uploading = path.startswith("/upload/")
        parts = path.removeprefix("/upload").removeprefix("/storage/v1/b/").split("/", 2)
        bucket, name = parts[0], unquote(parts[2]) if len(parts) == 3 else ""
        if bucket not in buckets.objects:
            return _refusal(404, "The specified bucket does not exist.")
        if self.command != "GET" and bucket in buckets.read_only:
            return _refusal(403, "somebody does not have storage.objects.create access.")
        stored = buckets.objects[bucket]
        if uploading:
            name = query["name"]
        if self.command == "GET" and not name:
            return self._list(bucket, query)
        content, generation = stored.get(name, (b"", 0))
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            return 412, b"", {}
        if uploading:
            return 200, _json(_described(name, body, buckets.put(bucket, name, body))), {}
        if not generation:
            return _refusal(404, "No such object")
        if self.command == "DELETE":
            del stored[name]
            return 204, b"", {}
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, b"", {}
        if query.get("alt") != "media":
            return 200, _json(_described(name, content, generation)), {}
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        asked = self.headers.get("Range")
        if asked is None:
            return 200, content, headers
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(len(content) - int(last), 0)
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return 206, content[start:stop], headers

    def _list(self, bucket: str, query: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        first, end = query.get("startOffset", ""), query.get("endOffset")
        first = max(first, bytes.fromhex(query.get("pageToken", "")).decode())
        names = sorted(n for n in self.buckets.objects[bucket] if n >= first and (end is None or n < end))
        page = names[:_PAGE]
        items = [_described(name, *self.buckets.objects[bucket][name]) for name in page]
        answer: dict[str, Any] = {"kind": "storage#objects", "items": items}
        if names[_PAGE:]:
            answer["nextPageToken"] = names[_PAGE].encode().hex()
        return 200, _json(answer), {}


def _described(name: str, content: bytes, generation: int) -> dict[str, str]:
    return {"name": name, "generation": str(generation), "size": str(len(content))}


def _refusal(status: int, message: str) -> tuple[int, bytes, dict[str, str]]:
    return status, _json({"error": {"code": status, "message": message}}), {}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
