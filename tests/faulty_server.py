"""A real HTTP server in front of a model, which fails on demand in every way that servers do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Asked = dict[str, Any]
Fault = Callable[["Handler", bytes], object]


class Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.turn:
            self.server.requests.append(asked)
            self.server.keys.append(self.headers["Authorization"])
            fault = self.server.faults.pop(0) if self.server.faults else None
        (fault or whole)(self, json.dumps(self.server.answer(asked)).encode())

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


class FaultyServer(ThreadingHTTPServer):
    """answer: the JSON that answers a request's JSON. faults: of the next requests, in order of arrival."""

    daemon_threads = True

    def __init__(self, answer: Callable[[Asked], Asked], port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.turn = answer, threading.Lock()
        self.faults: list[Fault] = []
        self.requests: list[Asked] = []
        self.keys: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def name(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1#model"

    def end(self) -> None:
        self.shutdown()
        self.server_close()

    def restarting(self, again: list[FaultyServer]) -> Fault:
        """The fault of being killed, and started again a second later; what was started is put into the list."""

        def killed(handler: Handler, body: bytes) -> None:
            dropped(handler, body)
            self.end()
            port = self.server_address[1]
            threading.Timer(1, lambda: again.append(FaultyServer(self.answer, port))).start()

        return killed


def whole(handler: Handler, body: bytes) -> None:
    handler.reply(200, body)


def error(status: int, **headers: str) -> Fault:
    message = json.dumps({"error": {"message": "it is said why", "type": "x", "code": None, "param": None}})
    return lambda handler, body: handler.reply(status, message.encode(), **headers)


def truncated(handler: Handler, body: bytes) -> None:
    handler.reply(200, body[: len(body) // 2])


def dropped(handler: Handler, body: bytes) -> None:
    handler.close_connection = True
    handler.connection.close()


def another_page(handler: Handler, body: bytes) -> None:
    handler.reply(200, b"<html>sign in</html>", Content_Type="text/html")
