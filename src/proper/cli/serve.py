"""Command `proper serve`: OpenAI-compatible HTTP server for all users of a run."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import proper
from proper.cli.options import RunFolder, size_in_bytes
from proper.errors import ReadOnlyError
from proper.extras import needs_extra
from proper.run_folder import require_run
from proper.sqlite_files import writable

logger = logging.getLogger(__name__)

EXAMPLES = """\
  proper serve runs/demo
  proper serve runs/demo --port 9000 --rows 16
  proper serve runs/demo --prefix-cache 1GiB
  proper serve runs/demo --host 0.0.0.0 --rate 600
  proper serve runs/demo --no-worker
"""


def watching(folder: Path) -> list[str]:
    """Return the command line of the fit worker process.

    -P: Python does not import modules from the current folder.
    """
    python = [sys.executable, "-P", "-m", "proper"]
    return [*python, "users", "update", str(folder), "--watch", "--parent", str(os.getpid())]


def command(
    folder: RunFolder,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; beyond 127.0.0.1 only with keys.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0 takes a free one.")] = 8000,
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="Batch rows: requests that run together.")] = 32,
    slots: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Adapter slots in memory; 1.25 per row by default.", show_default=False),
    ] = None,
    prefix_cache: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Memory for the KV cache of users' last prompts and answers; 0 keeps none."),
    ] = "64MiB",
    max_open: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most prompts that run or wait, over all keys.")
    ] = 1024,
    rate: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Requests per minute of each key.", show_default=False)
    ] = None,
    key_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Most rows of one key while other keys wait; half of all by default.",
            show_default=False,
        ),
    ] = None,
    keep_alive: Annotated[
        int, typer.Option(min=1, metavar="S", help="Seconds that a connection may be idle between two requests.")
    ] = 75,
    header_timeout: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="Seconds that the headers of a request may take.")
    ] = 20.0,
    body_timeout: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="Seconds that the body of a request may take.")
    ] = 60.0,
    max_connections: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Most connections; never more than the limit of open files allows.",
            show_default=False,
        ),
    ] = None,
    max_connections_per_address: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Most connections of one address; half of all by default.", show_default=False
        ),
    ] = None,
    drain: Annotated[int, typer.Option(min=0, metavar="S", help="Seconds that running requests get after SIGTERM.")] = (
        30
    ),
    log_users: Annotated[bool, typer.Option("--log-users", help="Log request paths, which contain user ids.")] = False,
    no_worker: Annotated[
        bool, typer.Option("--no-worker", help="Do not start the fitting worker; interactions stay queued.")
    ] = False,
) -> None:
    """Serve all users over HTTP with OpenAI's API.

    The field `user` of a request selects the personal model that answers. Routes: POST /v1/chat/completions and
    /v1/completions, GET /v1/models, /v1/users, /healthz, /readyz, /metrics and /openapi.json. New users and new
    interactions are fitted by a separate worker process, which loads the backbone a second time. SIGTERM or Ctrl-C
    lets running requests finish. If the engine fails, the process exits with code 1, so that a supervisor restarts it.
    As long as the run has never had a key, any program on this machine may send requests; other machines need a key.
    """
    run = require_run(folder)
    prefix_bytes = size_in_bytes("--prefix-cache", prefix_cache)
    with needs_extra("serve", "'proper serve'"):
        from proper.serving.app import ServeSettings, create_app
        from proper.serving.auth import is_loopback
        from proper.serving.connections import ConnectionLimits
        from proper.serving.fit_process import FitProcess
        from proper.serving.keys import FILE, Keys
        from proper.serving.limits import ServeLimits
        from proper.serving.server import free_port, make_server, require_keys, require_no_failure

    connections = ConnectionLimits(
        max_connections,
        max_connections_per_address,
        header_seconds=header_timeout,
        body_seconds=body_timeout,
        keep_alive_seconds=keep_alive,
    )
    keys = Keys(folder / FILE)
    keys.remember()
    if keys.required and not len(keys):
        logger.warning(f"proper: no key is valid, so nobody gets in; 'proper keys add {folder}' makes one")
    if not no_worker and not writable(run.users.manifest):
        raise ReadOnlyError(f"{folder}: is read-only, so nobody can be fitted; serve it with --no-worker")
    require_keys(host, keys, f"make one with: proper keys add {folder}")
    from proper.inference import load
    from proper.inference.engine import Engine
    from proper.inference.engine_thread import EngineThread
    from proper.inference.requests import EngineLimits

    with free_port(host, port) as socket:
        model = load(folder)
        runner = EngineThread(Engine(model, EngineLimits(rows, slots, prefix_bytes=prefix_bytes, flow_rows=key_rows)))
        limits = ServeLimits(open_requests=max_open, per_minute=rate)
        settings = ServeSettings(folder.resolve().name, proper.__version__, is_loopback(host), limits, log_users)
        fits = None if no_worker or model.store is None else FitProcess(watching(folder), logger.info)
        server = make_server(create_app(runner, keys, settings, logger.info, fits), drain, connections)
        runner.on_error = server.end
        address, number = socket.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        logger.info(
            f"proper: serving {folder} as {settings.model!r} on http://{shown}:{number} (Ctrl-C drains and stops)"
        )
        server.run([socket])
        model.close()
    require_no_failure(runner)
    logger.info("proper: stopped")
