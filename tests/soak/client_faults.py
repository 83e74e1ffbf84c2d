"""Faults by clients: a flood of requests, connections that never finish a request, a second server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from random import Random

import httpx
from clients import Client
from process_faults import Imports
from scene import Scene
from server import Server
from soak_users import LENGTHS, PROMPT

FLOODERS, REQUESTS = 8, 12
"""Threads of one flood, and the requests of each."""
BIG_BYTES = 950_000
"""Of a prompt that no model here has room for."""
IDLERS = 120
BEGINNINGS = (
    b"",
    b"POST /v1/comp",
    b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Slow: ",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
)
"""What an idle connection sends before it falls silent."""


@dataclass
class ClientFaults:
    """Faults over HTTP, and a second server."""

    scene: Scene
    idle: list[socket.socket]
    imports: Imports

    def run(self) -> None:
        """Go through all of them until the scene's end."""
        # The imports are here and not beside the others, so that the threads of a short soak end together.
        steps = [self.flood, self.idlers, self.second_server, self.imports.import_spoiled]
        self.scene.go_through("the crowd", lambda number: steps)

    def flood(self) -> None:
        """Many requests at once, some of them with a prompt near the limit of a body."""
        self.scene.await_server()
        threads = [threading.Thread(target=self._flood_one, args=(at,)) for at in range(FLOODERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.scene.ledger.fault("flood")

    def _flood_one(self, at: int) -> None:
        ledger = self.scene.ledger
        with httpx.Client(base_url=self.scene.server.url, timeout=120) as http:
            for number in range(REQUESTS):
                big = (at + number) % 4 == 0
                prompt = "word " * (BIG_BYTES // 5) if big else PROMPT
                body = {"model": self.scene.folder.name, "prompt": prompt, "max_tokens": 1}
                name = "flood of big prompts" if big else "flood"
                try:
                    reply = http.post("/v1/completions", json=body)
                except httpx.TransportError as error:
                    ledger.reply(f"{name}: {type(error).__name__}")
                    continue
                code = "" if reply.is_success else f" {reply.json()['error']['code']}"
                ledger.reply(f"{name}: {reply.status_code}{code}")

    def idlers(self) -> None:
        """Connections that never finish a request; they stay open until the server closes them."""
        self.scene.await_server()
        address, opened = ("127.0.0.1", self.scene.server.port), 0
        for at in range(IDLERS):
            with suppress(OSError):  # the server is being started, or has enough
                one = socket.create_connection(address, timeout=5)
                self.idle.append(one)
                one.sendall(BEGINNINGS[at % len(BEGINNINGS)])
                opened += 1
        if opened > IDLERS // 2:
            self.scene.ledger.fault("idle connections")

    def second_server(self) -> None:
        """Another server on the same folder, asked and taught, and stopped."""
        scene = self.scene
        extra = ("--no-worker",) if scene.random.random() < 0.5 else ()
        second = Server(scene.folder, 2, 2, *extra)
        with ExitStack() as last:
            last.callback(_kill, second)
            second.start()
            seed = scene.random.random()
            client = Client(
                f"second-{seed}", second.url, scene.folder.name, scene.words, scene.ledger, scene.stop, Random(seed)
            )
            with closing(client.http):
                for user in (*scene.words, None):
                    client.whole(user, scene.random.choice(LENGTHS))
                for _ in range(3):
                    client.teach()
            second.stop()
        if second.ended != [0]:
            scene.ledger.amiss(f"the second server ended with {second.ended}: {list(second.said)[-5:]}")
        scene.ledger.fault("second server")


def _kill(server: Server) -> None:
    with suppress(AssertionError, ProcessLookupError):
        server.kill()


def still_open(idle: Sequence[socket.socket]) -> int:
    """Count the connections that the server has not closed."""
    count = 0
    for one in idle:
        one.setblocking(False)
        try:
            while one.recv(4096):
                pass
        except BlockingIOError:
            count += 1
        except OSError:
            continue  # reset
    return count
