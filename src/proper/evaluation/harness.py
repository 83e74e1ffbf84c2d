"""A run folder judged: every method and seed on the same queries, then one results.json.

Knows where a run's files lie and which method is which stage; statistics and models are elsewhere.
"""

from __future__ import annotations

import difflib
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from proper.config import Config
from proper.data.dataset import Dataset
from proper.errors import ConfigError
from proper.evaluation.lamp_predictions import write_lamp_predictions
from proper.evaluation.metrics import Prediction, TaskInfo
from proper.evaluation.results import build_results, gains_by_user, plain
from proper.evaluation.routing import analyze_routing
from proper.evaluation.runner import MethodRun, answer_losses, mean_gates, predict, write_predictions
from proper.evaluation.truth import Truth, read_truth, truth_section
from proper.files import read_json, write_json
from proper.inference.folded import STATIC_EXPORT, folded_size, static_export
from proper.inference.personalized import PersonalizedModel, Stage, load

HISTORY_SAMPLE = 8
"""Newest history items per user on which overfitting is looked for."""


@dataclass(frozen=True)
class Harness:
    """A run to be judged.

    Attributes:
        folders: the run folder of every seed; the first is the run's own.
    """

    config: Config
    dataset: Dataset
    folders: Mapping[int, Path]

    @property
    def home(self) -> Path:
        """The run folder itself."""
        return next(iter(self.folders.values()))

    @property
    def task(self) -> TaskInfo:
        """What is predicted."""
        kind = self.config.task.kind
        return TaskInfo(self.config.data.task or Path(self.config.data.path).stem, kind, tuple(self.dataset.labels))

    def evaluate(self, methods: Sequence[str]) -> dict[str, Any]:
        """Answer all queries with all methods, write predictions, results and what the report reads; return results.

        Raises:
            ConfigError: a method is unknown.
            RunFolderError: a stage is missing.
        """
        stages = [known_method(method) for method in methods]
        runs = {seed: self._predict(folder, stages) for seed, folder in self.folders.items()}
        predictions = {seed: {m: run.predictions for m, run in by.items()} for seed, by in runs.items()}
        for seed, found in predictions.items():
            write_lamp_predictions(self.folders[seed] / "predictions", found, self.config.data, self.task)
        routing = self._routing() if {"groups", "users"} & set(stages) else None
        history_losses = self._history_losses() if "users" in stages else None
        results = build_results(
            predictions=predictions,
            task=self.task,
            run=self._facts(),
            seconds=self._seconds(),
            cost=self._cost(next(iter(runs.values()))),
            routing=routing,
            truth=self._truth(predictions, routing),
            history_losses=history_losses,
            resamples=self.config.evaluation.resamples,
        )
        if "users" in stages:
            results["tiers"] = self._tiers()
        gains = gains_by_user(predictions, self.task)
        write_json(self.home / "users.json", plain(gains))
        write_json(self.home / "results.json", results)
        return results

    def _predict(self, folder: Path, stages: Sequence[str]) -> dict[str, MethodRun]:
        runs: dict[str, MethodRun] = {}
        for stage in stages:
            with _opened(folder, stage, self.dataset) as model:
                runs[stage] = predict(model, self.dataset, self.config.task, f"{stage}, {folder.name}")
            write_predictions(folder / "predictions" / f"{stage}.jsonl", runs[stage].predictions)
        return runs

    def _routing(self) -> dict[str, Any]:
        """Routing figures of the first seed, from the gates of stage 2: the groups are what it found."""
        users = list(self.dataset.users("target"))
        ids = [user.id for user in users]
        model = load(self.home, "groups")
        gates = mean_gates(model, self.dataset, ids)
        embeddings = _embeddings(model, ids)
        model.close()
        truth = self._read_truth()
        groups = {user: truth.groups[user] for user in ids if user in truth.groups} if truth else None
        histories = {user.id: user.history for user in users}
        routing, detail = analyze_routing(gates.numpy(), ids, embeddings.numpy(), histories, groups)
        write_json(self.home / "routing.json", plain(detail))
        return routing

    def _history_losses(self) -> dict[str, float]:
        """Answer loss of every target user on their own newest history, first seed."""
        model = load(self.home, "users")
        losses = {}
        for user in self.dataset.users("target"):
            own = answer_losses(model, self.dataset.history(user.id, HISTORY_SAMPLE))
            losses[user.id] = sum(own) / len(own)
        model.close()
        return losses

    def _read_truth(self) -> Truth | None:
        path = Path(self.config.data.path).with_name("truth.json")
        return read_truth(path) if path.is_file() else None

    def _truth(
        self, predictions: Mapping[int, Mapping[str, Sequence[Prediction]]], routing: Mapping[str, Any] | None
    ) -> dict[str, Any] | None:
        truth = self._read_truth()
        if truth is None:
            return None
        return truth_section(truth, predictions, self.task, (routing or {}).get("nmi"))

    def _facts(self) -> dict[str, Any]:
        packages = ("proper-llm", "torch", "transformers", "peft", "accelerate")
        versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
        device = "cuda" if torch.cuda.is_available() and self.config.compute.device != "cpu" else "cpu"
        return {
            "backbone": self.config.backbone,
            "versions": versions,
            "data_sha256": self.dataset.sha256,
            "device": f"{device}, {torch.get_num_threads()} threads",
        }

    def _seconds(self) -> dict[str, float]:
        """Wall time of each stage, summed over seeds."""
        found: Counter[str] = Counter()
        for folder in self.folders.values():
            for stage in ("population", "groups", "users"):
                marker = folder / stage / "stage.json"
                if marker.exists():
                    found[stage] += read_json(marker)["seconds"]
        return dict(found)

    def _cost(self, runs: Mapping[str, MethodRun]) -> list[dict[str, Any]]:
        """What one user costs with each method, mean over target users, first seed."""
        rows = []
        for method, run in runs.items():
            numbers, size, seconds = self._user_cost(method)
            rows.append(
                {
                    "method": method,
                    "parameters_per_user": numbers,
                    "bytes_per_user": size,
                    "train_seconds_per_user": seconds,
                    "tokens_per_second": round(run.tokens / run.seconds, 1),
                }
            )
        return rows

    def _user_cost(self, method: str) -> tuple[float, float, float]:
        if method not in ("groups", "users", STATIC_EXPORT):
            return 0, 0, 0
        stage = "users" if method == STATIC_EXPORT else method
        model = load(self.home, cast(Stage, stage))
        assert model.users is not None
        targets = {user.id for user in self.dataset.users("target")}
        width = model.model.embedding_size
        adapter = model.model.layout(self.config.users.rank).width
        held = [(tier, size) for user, tier, _, size in model.users.facts() if user in targets]
        exported = folded_size(model)
        model.close()
        marker = read_json(self.home / stage / "stage.json")
        seconds = round(marker["seconds"] / max(1, marker["users"]), 3)
        if method == STATIC_EXPORT:
            return (*exported, seconds)
        if method == "groups":
            return width, 4 * width, seconds
        adapted = sum(tier == "users" for tier, _ in held) / len(held)
        return width + round(adapter * adapted), round(sum(size for _, size in held) / len(held)), seconds

    def _tiers(self) -> dict[str, Any]:
        """How many target users are served on which tier, and why, first seed."""
        model = load(self.home, "users")
        assert model.users is not None
        targets = {user.id for user in self.dataset.users("target")}
        held = [(tier, facts) for user, tier, facts, _ in model.users.facts() if user in targets]
        model.close()
        counts = Counter(tier for tier, _ in held)
        reasons = Counter(str(facts["reason"]) for _, facts in held if "reason" in facts)
        return {"groups": counts["groups"], "users": counts["users"], "reasons": dict(reasons.most_common())}


@contextmanager
def _opened(folder: Path, method: str, dataset: Dataset) -> Iterator[PersonalizedModel]:
    """The model that answers as this method, closed at the end."""
    if method == STATIC_EXPORT:
        with static_export(folder, dataset) as model:
            yield model
        return
    model = load(folder, cast(Stage, method))
    try:
        yield model
    finally:
        model.close()


def known_method(name: str) -> str:
    """Return a method by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    known = (*get_args(Stage), STATIC_EXPORT)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"evaluation.methods: no method '{name}'; {hint}")
    return name


def _embeddings(model: PersonalizedModel, users: Sequence[str]) -> Tensor:
    assert model.cache is not None
    return model.cache.embeddings(users)
