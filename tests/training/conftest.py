"""A tiny random Llama, a small data set, and what a stage needs to train on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from proper.config import Config, GroupsConfig, OptimizerConfig, make_config
from proper.data.dataset import Dataset, Sample, prepare
from proper.data.encoder import EncodedExample, Encoder
from proper.data.histories import TextExample
from proper.models.backbone import Backbone
from proper.models.personal import ProperModel
from proper.training.checkpoint import Checkpoint
from proper.training.jobs import Job
from proper.training.trainer import TrainingPlan

HISTORIES = {"ann": 13, "bob": 9, "çem": 6, "dan/../x": 4, "eve": 8, "fay": 5}


@dataclass(frozen=True)
class InMemory:
    """Rows to train on, in the same order in every epoch; with `turns`, reversed in every second epoch."""

    all: tuple[TextExample, ...]
    turns: bool = False

    @property
    def size(self) -> int:
        return len(self.all)

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.all)

    def rows(self, epoch: int) -> Iterator[TextExample]:
        return iter(self.all[:: -1 if self.turns and epoch % 2 else 1])


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture(scope="session")
def grouped(backbone: Callable[..., Backbone]) -> Callable[..., ProperModel]:
    """Build a model with random experts and user-aware routers, as if stage 2 were done."""

    def build(dtype: torch.dtype = torch.float32, **groups: Any) -> ProperModel:
        model = ProperModel(backbone(dtype))
        model.add_experts(GroupsConfig(**{"user_embedding": 16, **groups}), seed=0)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.group_parameters().values():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            parameter.requires_grad_(False)
        return model

    return build


@pytest.fixture(scope="session")
def jobs() -> list[Job]:
    """Users with histories of different lengths, some with items of their own held out."""
    generator = torch.Generator().manual_seed(5)

    def item(user: str) -> EncodedExample:
        prompt, answer = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((3, 20), (1, 5)))
        return EncodedExample(
            user, tuple(torch.randint(3, 60, (prompt + answer,), generator=generator).tolist()), prompt
        )

    made = []
    for user, size in {"ann": 3, "bob": 9, "çem": 6, "dan": 14, "eve": 5}.items():
        embedding = 0.5 * torch.randn(16, generator=generator)
        made.append(Job(user, embedding, tuple(item(user) for _ in range(size)), epochs=2))
    return made


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory, backbone: Callable[..., Backbone]) -> Config:
    """The config of a run on a small data set, with the tiny backbone in a folder."""
    folder = tmp_path_factory.mktemp("settings")
    tiny = backbone()
    tiny.model.save_pretrained(folder / "backbone")
    tiny.tokenizer.save_pretrained(folder / "backbone")
    words = ["red", "green", "blue", "small", "large", "old", "new", "quiet", "loud", "round"]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, (user, size) in enumerate(HISTORIES.items()):
            for at in range(size + 2):
                text = " ".join(words[(number * 3 + at * k) % 10] for k in range(1, 3 + (at * 5 + number) % 7))
                row = {"user_id": user, "timestamp": at, "input": f"{text} is", "output": words[(number + at) % 3]}
                file.write(json.dumps(row) + "\n")
    return make_config(
        {
            "data": {"path": str(folder / "rows.jsonl"), "prompt": "{input}"},
            "backbone": str(folder / "backbone"),
            "compute": {"dtype": "fp32", "max_length": 64, "device": "cpu"},
            "split": {"target_users": 4, "min_history": 1, "shared_items": "allow"},
            "groups": {"user_embedding": 16},
        }
    )


@pytest.fixture(scope="session")
def encoder(backbone: Callable[..., Backbone]) -> Encoder:
    return Encoder(backbone().tokenizer, 64)


@pytest.fixture(scope="session")
def dataset(settings: Config, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    with prepare(settings, tmp_path_factory.mktemp("data") / "data.sqlite", encoder.count) as prepared:
        yield prepared


@pytest.fixture
def plan(dataset: Dataset, encoder: Encoder, tmp_path: Path) -> Callable[..., TrainingPlan]:
    """`plan(config)` trains on all histories; steps are appended to `log` where it is a list."""

    def build(
        config: OptimizerConfig,
        *,
        log: list[dict[str, Any]] | Callable[[dict[str, Any]], None] | None = None,
        sample: Sample | None = None,
        seed: int = 0,
        seconds: float = 1e9,
        name: str = "stage",
        batch_tokens: int = 4096,
    ) -> TrainingPlan:
        return TrainingPlan(
            config=config,
            rate=2e-3,
            seed=seed,
            encoder=encoder,
            pad=0,
            sample=sample or dataset.sample("all", None, 0),
            checkpoint=Checkpoint(tmp_path / f"{name}.checkpoint", seconds),
            log=log if callable(log) else [].append if log is None else log.append,
            batch_tokens=batch_tokens,
        )

    return build
