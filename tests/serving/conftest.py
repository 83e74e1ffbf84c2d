"""A server on a thread of this process, and the tiny run behind it as a model to compare with."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from proper.cli.serve import watching
from proper.inference import PersonalizedModel, load
from proper.inference.engine import Engine
from proper.inference.engine_thread import EngineThread
from proper.inference.requests import EngineLimits
from proper.serving.app import ServeSettings, create_app
from proper.serving.connections import ConnectionLimits
from proper.serving.fit_process import FitProcess
from proper.serving.keys import FILE, Keys
from proper.serving.limits import ServeLimits
from proper.serving.server import free_port, make_server


@dataclass
class Running:
    """A server that runs."""

    url: str
    folder: Path
    engine: Engine
    keys: Keys
    log: list[str] = field(default_factory=list)
    worker: FitProcess | None = None

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, verify=False)

    def figures(self, key: str | None = None) -> dict[str, float]:
        """The metrics by name with labels."""
        with self.client(key) as client:
            lines = client.get("/metrics").text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}


@pytest.fixture(scope="session")
def long_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with longer rows, so that an answer takes a while."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    shutil.copytree(tiny_run, folder)
    raw: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    raw["compute"]["max_length"] = 250
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def alone(long_run: Path) -> Iterator[PersonalizedModel]:
    """What `proper generate` answers with."""
    model = load(long_run)
    yield model
    model.close()


Serve = Callable[..., Running]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """`serve(folder, ...)`: start a server; all are drained in the end."""
    stops: list[Callable[[], None]] = []

    def start(
        folder: Path,
        limits: ServeLimits | None = None,
        rows: int = 8,
        slots: int = 4,
        log_users: bool = False,
        fits: bool = False,
        connections: ConnectionLimits | None = None,
        **more: Any,
    ) -> Running:
        model, keys, log = load(folder), Keys(folder / FILE), []
        worker = FitProcess(watching(folder), log.append, pause=0.1) if fits else None
        engine = Engine(model, EngineLimits(rows, slots, **more))
        settings = ServeSettings("tiny", limits=limits or ServeLimits(), log_users=log_users)
        server = make_server(create_app(EngineThread(engine), keys, settings, log.append, worker), 10, connections)
        bound = free_port("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join()
            bound.close()
            model.close()

        stops.append(stop)
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return Running(f"http://127.0.0.1:{bound.getsockname()[1]}", folder, engine, keys, log, worker)

    yield start
    for stop in stops:
        stop()


@pytest.fixture(scope="module")
def server(serve: Serve, long_run: Path) -> Running:
    """One server without keys for a module's tests."""
    return serve(long_run)


@pytest.fixture
def own(serve: Serve, tiny_run: Path, tmp_path: Path) -> Running:
    """A server whose store may be changed."""
    return serve(shutil.copytree(tiny_run, tmp_path / "tiny"))
