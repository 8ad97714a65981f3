"""A local server that speaks enough of the Hugging Face hub for its clients to read data sets, from folders.

Covers what repositories and files there are, and parts of files. Every repository has one commit, COMMIT.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
REVISIONS = ("main", COMMIT, "v1", "refs/convert/parquet")
_REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together: else an answer's body waits until its head is acknowledged

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self._answer([asked] if isinstance(asked, str) else asked)

    def do_GET(self) -> None:
        self._answer([])

    def _answer(self, paths: list[str]) -> None:
        self.server.asked.append(self.path)
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(rf"/api/datasets/{_REPOSITORY}(/(?P<what>revision|tree|paths-info)/(?P<rest>.*))?", path)
        file = re.fullmatch(rf"/datasets/{_REPOSITORY}/resolve/(?P<rest>.*)", path)
        match = api or file
        folder = self.server.root / match["repository"] if match else None
        if not match or folder is None or not folder.is_dir():
            return self._refuse("RepoNotFound")
        rest = match["rest"] or "main"
        revision = next((each for each in REVISIONS if f"{rest}/".startswith(f"{each}/")), None)
        if revision is None:
            return self._refuse("RevisionNotFound")
        inner = rest.removeprefix(revision).strip("/")
        if file:
            return self._send_file(folder / inner)
        files = sorted(each for each in folder.rglob("*"))
        if match["what"] in (None, "revision"):
            siblings = [{"rfilename": str(each.relative_to(folder))} for each in files if each.is_file()]
            return self._send_json({"id": match["repository"], "sha": COMMIT, "siblings": siblings, "tags": []})
        if match["what"] == "tree":
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            if not (folder / inner).is_dir():
                return self._refuse("EntryNotFound")
            within = [each for each in files if (folder / inner) in each.parents]
            return self._send_json(
                [_entry(folder, each) for each in within if recursive or each.parent == folder / inner]
            )
        return self._send_json([_entry(folder, folder / each) for each in paths if (folder / each).exists()])

    def _send_file(self, path: Path) -> None:
        if not path.is_file():
            return self._refuse("EntryNotFound")
        content, status, headers = path.read_bytes(), 200, {"Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
            content, status = content[begin : end + 1], 206
        headers |= {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(path)}"'}
        self._send(status, content, headers)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: str) -> None:
        self._send(404, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    inner = {"path": str(path.relative_to(folder))}
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, **inner}
    return {"type": "file", "oid": _digest(path), "size": path.stat().st_size, **inner}


class HubServer(ThreadingHTTPServer):
    """root: has a folder OWNER/NAME for each repository. asked: the paths of all requests."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.asked = root, list[str]()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What clients have to be started with: they read it when they are imported."""
        address = f"http://127.0.0.1:{self.server_address[1]}"
        return {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def end(self) -> None:
        self.shutdown()
        self.server_close()
