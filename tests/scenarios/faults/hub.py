"""A small Hugging Face hub on this machine, whose connections can break in the middle of a file."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """Serves the folders under `root` as repositories, `models/me/tiny` and `datasets/me/pairs`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cut: set[str] = set()
        """Names of files of which only the first half is ever sent."""
        self.sent: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def folder(self, kind: str, name: str) -> Path:
        return self.root / kind / name

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(head=True)

            def do_GET(self) -> None:
                self._answer(head=False)

            def do_POST(self) -> None:
                asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer(head=False, asked=asked)

            def _answer(self, head: bool, asked: bytes = b"") -> None:
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                if "resolve" in parts:
                    at = parts.index("resolve")
                    name = parts[:at] if parts[0] == "datasets" else ["models", *parts[:at]]
                    return self._file(hub.root.joinpath(*name, *parts[at + 2 :]), head)
                if parts[0] == "api":
                    return self._api(parts[1:], asked)
                return self._json({"error": "unknown"}, 404)

            def _api(self, parts: list[str], asked: bytes) -> None:
                folder = hub.root.joinpath(*parts[:3])
                if not folder.is_dir():
                    return self._json({"error": "Repository not found"}, 404, "RepoNotFound")
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                entries = [
                    {
                        "type": "file",
                        "path": p.relative_to(folder).as_posix(),
                        "size": p.stat().st_size,
                        "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                    }
                    for p in files
                ]
                if "tree" in parts:
                    return self._json(entries)
                if "paths-info" in parts:
                    wanted = json.loads(asked or b"{}").get("paths", [])
                    return self._json([e for e in entries if e["path"] in wanted])
                return self._json(
                    {
                        "id": "/".join(parts[1:3]),
                        "sha": COMMIT,
                        "private": False,
                        "tags": [],
                        "downloads": 0,
                        "lastModified": "2026-01-01T00:00:00.000Z",
                        "siblings": [{"rfilename": e["path"]} for e in entries],
                    }
                )

            def _json(self, value: Any, status: int = 200, error: str = "") -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                if error:
                    self.send_header("X-Error-Code", error)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def _file(self, path: Path, head: bool) -> None:
                if not path.is_file():
                    return self._json({"error": "Entry not found"}, 404, "EntryNotFound")
                content = path.read_bytes()
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
                self.send_response(206 if start else 200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("Accept-Ranges", "bytes")
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                if head:
                    return None
                cut = path.name in hub.cut
                self.wfile.write(content[start : len(content) // 2] if cut else content[start:])
                hub.sent.append(f"{path.name} {'cut' if cut else 'whole'} from {start}")
                if cut:
                    self.wfile.flush()
                    self.close_connection = True
                return None

        return Handler
