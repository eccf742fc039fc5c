"""An HTTP server on loopback that serves a folder by byte ranges, and fails as it is told to."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Plan = Callable[[str, int], str]
"""(file name, how often this range of it was asked for before) to a fault, "" for none."""
FAULTS = ("500", "503", "429", "reset", "short", "cut", "flip", "stall")
STALL = 30.0


class Server:
    """Serves `folder`; `plan` says which answer fails, and how; `asked` counts the requests by file."""

    def __init__(self, folder: Path, plan: Plan | None = None) -> None:
        self.folder, self.plan = folder, plan or (lambda name, before: "")
        self.asked: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.ranges: Counter[tuple[str, str]] = Counter()
        self.lock, self.closing = threading.Lock(), threading.Event()

    def fault(self, name: str, wanted: str) -> str:
        with self.lock:
            before = self.ranges[name, wanted]
            self.ranges[name, wanted] += 1
            self.asked[name] += 1
            fault = self.plan(name, before)
            self.faults[fault] += 1
        return fault


@contextlib.contextmanager
def serving(server: Server) -> Iterator[str]:
    """The URL of a server in a thread of its own."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            wanted = self.headers.get("Range", "")
            fault = server.fault(name, wanted)
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            if fault == "stall":
                server.closing.wait(STALL)
            if fault.isdigit():
                self.send_error(int(fault))
                return
            file = server.folder / self.path.lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            data, status = file.read_bytes(), 200
            if wanted and fault != "whole":
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                if int(first) >= len(data):
                    self.send_error(416)
                    return
                data, status = data[int(first) : int(last) + 1], 206
            if fault == "flip":
                data = (
                    data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]
                )
            if fault == "cut":
                data = data[: len(data) // 2]
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data[: len(data) // 2] if fault == "short" else data)
            if fault == "short":
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    http = Listener(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        server.closing.set()
        http.shutdown()
        http.server_close()


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.monotonic()
    call()
    return time.monotonic() - began
