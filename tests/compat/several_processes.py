"""Run stages in one of several processes; started by torchrun, as `accelerate launch` does it.

    torchrun --nproc-per-node 2 several_processes.py DATA NOTES FOLDER...

Every FOLDER holds a config.yaml. Each process leaves in NOTES what it wrote to inside the FOLDERs and what it has in
memory at the end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from proper.config import load_config
from proper.data.dataset import Dataset
from proper.models.checkpoints import save_tensors
from proper.training.metrics_log import MetricsLog
from proper.training.stages import StageRunner

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(folders: list[Path]) -> list[str]:
    """Note from now on everything that this process does to files inside the folders.

    A file without a name (opened by its folder's path) is not noted: no other process can meet it.
    """
    seen: list[str] = []
    inside = tuple(str(folder) for folder in folders)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "sqlite3.connect")
        if event == "open":
            mode, flags = arguments[1:3]
            changes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & WRITING)
            changes = changes and not os.path.isdir(arguments[0])
        if changes:
            seen.extend(f"{event} {path}" for path in arguments[:2] if str(path).startswith(inside))

    sys.addaudithook(hook)
    return seen


def main(data: Path, notes: Path, folders: list[Path]) -> None:
    seen, rank = watch(folders), int(os.environ["RANK"])
    torch.set_num_threads(1)
    memory: dict[str, torch.Tensor] = {}
    with Dataset.open(data) as dataset:
        for folder in folders:
            config = load_config(folder / "config.yaml")
            for attempt in ("train", "go on"):
                log = MetricsLog(folder / "metrics.jsonl") if rank == 0 else None
                runner = StageRunner(config, dataset, folder, 0, log or (lambda _: None))
                assert runner.accelerator.num_processes == int(os.environ["WORLD_SIZE"])
                runner.run(("population", "groups", "users"))
                if log is not None:
                    log.close()
                if attempt == "train":
                    memory |= {f"{folder.name}/{n}": p for n, p in runner.backbone.model.named_parameters()}
    save_tensors(notes / f"memory-{rank}.safetensors", memory, {})
    (notes / f"writes-{rank}.json").write_text(json.dumps(seen))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]])
