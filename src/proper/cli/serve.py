"""Command `proper serve`: OpenAI-compatible HTTP server for all users of a run."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import proper
from proper.cli.options import RunFolder
from proper.errors import InputError, ProperError, ReadOnlyError
from proper.extras import needs_extra
from proper.run_folder import require_run
from proper.sqlite_files import writable

if TYPE_CHECKING:
    from proper.inference.requests import EngineLimits
    from proper.serving.connections import ConnectionLimits
    from proper.serving.engines import EngineRunner
    from proper.serving.limits import ServeLimits
    from proper.serving.switching import Application

logger = logging.getLogger(__name__)

EXAMPLES = """\
  proper serve runs/demo
  proper serve runs/demo --port 9000 --rows 16
  proper serve runs/demo --prefix-cache 1GiB
  proper serve runs/demo --host 0.0.0.0 --rate 600
  proper serve runs/demo --no-worker
  proper serve runs/demo --cluster local:2
  proper serve /shared/runs/notes --cluster auto --replicas 2:8
"""

# Address.
Host = Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on; beyond 127.0.0.1 only with keys.")]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0 takes a free one.")]

# Engine: memory, and requests that run together.
Rows = Annotated[int, typer.Option(min=1, metavar="N", help="Batch rows: requests that run together.")]
Slots = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Adapter slots in memory; 1.25 per row by default.", show_default=False),
]
PrefixCache = Annotated[
    str,
    typer.Option(metavar="SIZE", help="Memory for the KV cache of users' last prompts and answers; 0 switches it off."),
]

# Requests: limits per key, and for all keys together.
MaxOpen = Annotated[
    int, typer.Option(min=1, metavar="N", help="Maximum number of prompts that run or wait, for all keys together.")
]
Rate = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Requests per minute of each key.", show_default=False)
]
KeyRows = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Maximum number of rows of one key while other keys wait; half of all by default.",
        show_default=False,
    ),
]

# Connections.
KeepAlive = Annotated[
    int, typer.Option(min=1, metavar="S", help="Seconds that a connection may be idle between two requests.")
]
HeaderTimeout = Annotated[
    float, typer.Option(min=0.1, metavar="S", help="Seconds that the headers of a request may take.")
]
BodyTimeout = Annotated[float, typer.Option(min=0.1, metavar="S", help="Seconds that the body of a request may take.")]
MaxConnections = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Maximum number of connections; never more than the limit of open files allows.",
        show_default=False,
    ),
]
MaxConnectionsPerAddress = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Maximum number of connections of one address; half of all by default.",
        show_default=False,
    ),
]

# Process.
Drain = Annotated[int, typer.Option(min=0, metavar="S", help="Seconds that running requests get after SIGTERM.")]
LogUsers = Annotated[bool, typer.Option("--log-users", help="Log request paths, which contain user ids.")]
NoWorker = Annotated[
    bool, typer.Option("--no-worker", help="Do not start the fitting worker; interactions stay queued.")
]

# Cluster.
Cluster = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Answer with replicas on a Ray cluster: auto or local:N.", show_default=False),
]
Replicas = Annotated[
    str | None,
    typer.Option(
        metavar="N|MIN:MAX", help="Replicas; one per device by default. A range scales by load.", show_default=False
    ),
]


def command(
    folder: RunFolder,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    rows: Rows = 32,
    slots: Slots = None,
    prefix_cache: PrefixCache = "64MiB",
    max_open: MaxOpen = 1024,
    rate: Rate = None,
    key_rows: KeyRows = None,
    keep_alive: KeepAlive = 75,
    header_timeout: HeaderTimeout = 20.0,
    body_timeout: BodyTimeout = 60.0,
    max_connections: MaxConnections = None,
    max_connections_per_address: MaxConnectionsPerAddress = None,
    drain: Drain = 30,
    log_users: LogUsers = False,
    no_worker: NoWorker = False,
    cluster: Cluster = None,
    replicas: Replicas = None,
) -> None:
    """Serve all users over HTTP with OpenAI's API.

    The field `user` of a request selects the personal model that answers. Routes: POST /v1/chat/completions and
    /v1/completions, GET /v1/models, /v1/users, /healthz, /readyz, /metrics and /openapi.json. New users and new
    interactions are fitted by a separate worker process, which loads the backbone a second time. SIGTERM or Ctrl-C
    lets running requests finish. SIGHUP opens DIR again without interruption, to switch a symbolic link to another run.
    If the engine fails, the process exits with code 1, so that a supervisor restarts it. If the run has never had a
    key, any program on this machine may send requests; other machines need a key.
    With --cluster, --rows, --slots and --prefix-cache are per replica; other limits apply to all replicas together.
    """
    require_run(folder)
    prefix_bytes = size_in_bytes("--prefix-cache", prefix_cache)
    with needs_extra("serve", "'proper serve'"):
        from proper.serving.connections import ConnectionLimits
        from proper.serving.limits import ServeLimits
    from proper.inference.requests import EngineLimits

    connections = ConnectionLimits(
        max_connections,
        max_connections_per_address,
        header_seconds=header_timeout,
        body_seconds=body_timeout,
        keep_alive_seconds=keep_alive,
    )
    limits = ServeLimits(open_requests=max_open, per_minute=rate)
    engine = EngineLimits(rows, slots, prefix_bytes=prefix_bytes, flow_rows=key_rows)
    options = _Options(host, port, limits, connections, drain, log_users, not no_worker)
    if cluster is None:
        if replicas is not None:
            raise InputError("--replicas: only with --cluster")
        _serve(folder, options, partial(_this_process, engine))
        return
    with needs_extra("cluster", f"--cluster {cluster}"):
        from proper.cluster.deployment import replicas_on
    _check_keys(folder, options)
    with replicas_on(cluster, folder.absolute().name, engine, replicas, float(drain)) as made:
        _serve(folder, options, made.serving)


@dataclass(frozen=True)
class _Options:
    """Options of the server, in the same words."""

    host: str
    port: int
    limits: ServeLimits
    connections: ConnectionLimits
    drain: int
    log_users: bool
    worker: bool


@contextmanager
def _this_process(capacity: EngineLimits, folder: Path) -> Iterator[EngineRunner]:
    """Load a run's model with an engine into this process."""
    from proper.inference import load
    from proper.inference.engine import Engine
    from proper.inference.engine_thread import EngineThread

    model = load(folder)
    yield EngineThread(Engine(model, capacity))
    model.close()


def _serve(folder: Path, options: _Options, opened: Callable[[Path], AbstractContextManager[EngineRunner]]) -> None:
    """Serve a run with what `opened` gives until SIGTERM, SIGINT or a failure of the engine; SIGHUP opens it anew."""
    with needs_extra("serve", "'proper serve'"):
        from proper.serving.app import ServeSettings, create_app
        from proper.serving.auth import is_loopback
        from proper.serving.fit_process import FitProcess
        from proper.serving.keys import FILE, Keys
        from proper.serving.server import free_port, make_server, require_no_failure
        from proper.serving.switching import SwitchableApp
    _check_keys(folder, options)
    name, only_here = folder.resolve().name, is_loopback(options.host)
    settings = ServeSettings(name, proper.__version__, only_here, options.limits, options.log_users)
    runners: list[EngineRunner] = []

    @contextmanager
    def application() -> Iterator[Application]:
        run = require_run(folder.resolve()).path  # the folder may be a link, which leads to another run after a while
        with opened(run) as runner, closing(Keys(run / FILE)) as keys:
            has_users = runner.engine.model.store is not None
            fits = FitProcess(watching(run), logger.info) if options.worker and has_users else None
            runner.on_error = lambda: server.end()
            runners[:] = [runner]
            yield create_app(runner, keys, settings, logger.info, fits)

    def renew() -> None:
        try:
            app.renew()
        except (ProperError, OSError) as error:
            logger.warning(f"proper: cannot switch to {folder}: {error}")
        else:
            logger.info(f"proper: serving {folder.resolve()}")

    with free_port(options.host, options.port) as socket:
        app = SwitchableApp(application)
        server = make_server(app, options.drain, options.connections)
        server.on_hangup = renew
        host, port = socket.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        logger.info(f"proper: serving {folder} as {settings.model!r} on {url} (Ctrl-C drains and stops)")
        server.run([socket])
        app.close()
    require_no_failure(runners[0])
    logger.info("proper: stopped")


def _check_keys(folder: Path, options: _Options) -> None:
    """Check that the run's API keys allow to listen on the host.

    Raises:
        InputError: other machines could send requests, and there are no keys.
        ReadOnlyError: a worker is to be started and the run cannot be written.
    """
    from proper.serving.keys import FILE, Keys
    from proper.serving.server import require_keys

    with closing(Keys(folder / FILE)) as keys:
        keys.remember()
        if keys.required and not len(keys):
            logger.warning(
                f"proper: no key is valid, so every request is refused; 'proper keys add {folder}' makes one"
            )
        if options.worker and not writable(require_run(folder).users.manifest):
            raise ReadOnlyError(f"{folder}: is read-only, so no user can be fitted; serve it with --no-worker")
        require_keys(options.host, keys, f"make one with: proper keys add {folder}")


def watching(folder: Path) -> list[str]:
    """Return the command line of the fit worker process.

    -P: Python does not import modules from the current folder.
    """
    python = [sys.executable, "-P", "-m", "proper"]
    return [*python, "users", "update", str(folder), "--watch", "--parent", str(os.getpid())]


def size_in_bytes(option: str, text: str) -> int:
    """Return the number of bytes of a size such as `64MiB`, `1.5G`, `4096` or `0`; K, M and G are powers of 1024.

    Raises:
        InputError: `text` is not a size; the message names the option.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"{option}: {text!r} is not a size, write it as 64MiB, 1GiB or 0")
    return int(float(found[1]) * 1024 ** ["", "k", "m", "g"].index(found[2].lower()))
