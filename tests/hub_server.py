"""A small Hub on this machine, for the real `huggingface_hub` client: ``with HubServer() as hub: ... hub.url ... hub.token``.

Written from what the client (2.4) asks: the packages on the index that call themselves a Hub are mirrors, which only read, or
clients of a program that they do not bring. What it speaks is in `hub_protocol`, its storage for large files in `hub_storage`.

Faults come by order of a test: ``hub.fail("POST", "/commit/", times=2, status=503)``.
"""

from __future__ import annotations

import json
import os
import re
import socket
import socketserver
import struct
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from hub_protocol import Hub
from hub_storage import Answer, Commit, Request


@dataclass
class Fault:
    method: str
    pattern: str
    times: float
    status: int | None
    headers: dict[str, str]
    cut: int | None
    delay: float
    lose_answer: bool


class HubServer(Hub):
    """A Hub on two ports of this machine: the Hub itself, and its storage, which so is another origin.

    Args:
        settings: Those of ``Hub``.
    """

    def __init__(self, **settings: int) -> None:
        super().__init__(**settings)
        self.requests: list[Request] = []
        self.stopped = threading.Event()
        self._faults: list[Fault] = []

    def __enter__(self) -> HubServer:
        self._servers = [_Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})) for _ in range(2)]
        hosts = ("127.0.0.1", "localhost")  # clients before 2 compare the names of hosts, without ports
        self.url, self.storage_url = (f"http://{host}:{at.server_port}" for host, at in zip(hosts, self._servers))
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    # What a test orders and asks

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        times: float = 1,
        status: int | None = None,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
        delay: float = 0,
        lose_answer: bool = False,
    ) -> None:
        """Let the next requests of a method whose path a pattern is found in go wrong.

        Args:
            method: GET, HEAD, POST, PUT or DELETE.
            pattern: Regular expression.
            times: How many requests; ``math.inf`` for all.
            status: Answer with this status instead of doing anything.
            headers: Of that answer, such as Retry-After.
            cut: Break the connection after so many bytes of what comes in or, of a download, goes out.
            delay: Wait so many seconds before anything else.
            lose_answer: Do all that was asked, and break the connection instead of saying so.
        """
        self._faults.append(Fault(method, pattern, times, status, headers or {}, cut, delay, lose_answer))

    def heal(self) -> None:
        """Take back all faults."""
        self._faults.clear()

    def asked(self, method: str, pattern: str) -> list[Request]:
        """Return the requests so far of a method whose path a pattern is found in."""
        return [made for made in self.requests if made.method == method and re.search(pattern, made.path)]

    def pushed(self, repo_id: str) -> list[Commit]:
        """Return the commits that came in, the oldest first, without the one that every repository begins with."""
        return self.repositories[repo_id].commits[1:]

    def environment(self, home: str | os.PathLike[str], **changes: str) -> dict[str, str]:
        """Return the environment of a process whose client speaks to this Hub, and keeps its cache and token in a folder.

        Args:
            home: The folder; nothing of the user's own cache is seen.
            changes: What else to set. Without it, no token is known and nothing goes by Xet.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return kept | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])} | quiet | ours | changes

    def _fault_of(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method == request.method and re.search(fault.pattern, request.path):
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the network for this machine's name
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that went away is no mistake of ours
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer's body waits 40 ms for the receipt of its head
    hub: HubServer

    def log_message(self, *_: object) -> None:
        """Keep quiet: the requests are in ``hub.requests``."""

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        token = headers["authorization"].removeprefix("Bearer ") if "authorization" in headers else None
        is_storage = self.server is self.hub._servers[1]
        request = Request(self.command, path, token, headers, parse_qs(query), is_storage)
        self.hub.requests.append(request)
        fault = self.hub._fault_of(request)
        if fault and fault.delay:
            self.hub.stopped.wait(fault.delay)
        has_body = "content-length" in headers or "chunked" in headers.get("transfer-encoding", "")
        if fault and fault.cut is not None and has_body:
            self.rfile.read(min(fault.cut, int(headers.get("content-length", fault.cut))))
            return self._break()
        request.body = self._body(headers)
        if fault and fault.status:
            answer = Answer({"error": f"fault {fault.status}"}, fault.status, fault.headers)
        else:
            answer = self.hub.answer(request)
        request.status = answer.status
        if fault and fault.lose_answer:
            return self._break()
        return self._send(answer, cut=fault.cut if fault else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _body(self, headers: dict[str, str]) -> bytes:
        if "chunked" not in headers.get("transfer-encoding", ""):
            return self.rfile.read(int(headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Answer, *, cut: int | None) -> None:
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        kind = "application/octet-stream" if isinstance(answer.body, bytes) else "application/json"
        try:
            self.send_response(answer.status)
            for name, value in {"Content-Type": kind, **answer.headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:cut])
        except OSError:  # the client has gone
            return self._break()
        return self._break(reset=False) if cut is not None else None

    def _break(self, *, reset: bool = True) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
