"""The server of `experiments.simulation`: random adapters on proper-nano behind the real HTTP server.

python -m experiments.simulation_server FOLDER PORT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from proper.benchmarks.backbones import BenchBackbone
from proper.benchmarks.serve_setup import Served, ServedShape
from proper.inference.engine import Engine
from proper.inference.engine_thread import EngineThread
from proper.inference.requests import EngineLimits
from proper.serving.app import ServeSettings, create_app
from proper.serving.keys import Keys
from proper.serving.server import free_port, make_server

USERS, ROWS, SLOTS = 48, 3, 8
LONGEST_PROMPT, LONGEST_ANSWER = 96, 16


def serve(folder: Path, port: int) -> None:
    """Serve until the process is terminated."""
    device, backbone = torch.device("cpu"), BenchBackbone()
    shape = ServedShape(backbone, "all", torch.float32, USERS, 1, LONGEST_PROMPT, LONGEST_ANSWER)
    served = Served(shape, backbone.load(torch.float32, device), device, folder)
    engine = Engine(served.personal, EngineLimits(ROWS, SLOTS, prefix_bytes=0))
    app = create_app(EngineThread(engine), Keys(folder / "keys.json"), ServeSettings("served"), lambda line: None)
    with free_port("127.0.0.1", port) as bound:
        make_server(app, 5).run([bound])


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
