"""A server on loopback that speaks the Hub's protocol as huggingface_hub uses it, and fails when asked to."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

from tests.hub.protocol import Handler
from tests.hub.repos import Repo


@dataclass
class Fault:
    """What to do to the next `times` requests of a method and path: answer `status`, or hang up after
    `drop_after` bytes of the body."""

    method: str
    path: str
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "fault"
    drop_after: int | None = None
    after: bool = False  # do it first, then lose the answer


class HubServer(ThreadingHTTPServer):
    """The server; `url` is for HF_ENDPOINT. One token is valid: `token`, of a user in the organisation acme.

    requests: (method, path) in order. sent: bytes of bodies that reached the store, by path of the request.
    """

    daemon_threads = True

    def __init__(self, token: str = "hf_loopbacktoken0123456789", part: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.part, self.role = token, part, "write"
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.sent: dict[str, int] = {}
        self.lock = threading.RLock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def fail(self, method: str, path: str, **how: Any) -> None:
        """Inject a fault; `path` is a regular expression."""
        self.faults.append(Fault(method, path, **how))

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that is due, taken."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that were dropped on purpose are no news."""
