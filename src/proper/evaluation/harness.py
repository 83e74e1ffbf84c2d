"""Evaluation harness of a run folder: every method and seed on the same queries, written to one results.json.

How a method is trained and answers comes in as a `MethodSpec`.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proper.adapters.store import AdapterStore
from proper.config import Config
from proper.console import progress
from proper.data.checks import queries_seen_by_others, require_no_leaks, require_queries, targets_outside
from proper.data.dataset import Dataset
from proper.data.one_task import one_task
from proper.data.stage_sample import stage_sample
from proper.evaluation.fingerprint import code_version, served_version
from proper.evaluation.lamp_predictions import write_lamp_predictions
from proper.evaluation.metrics import Prediction, TaskInfo
from proper.evaluation.results import RawResults, build_results, gains_by_user, plain
from proper.evaluation.routing import analyze_routing, task_routing
from proper.evaluation.runner import MethodRun, answer_losses, mean_gates
from proper.evaluation.several_tasks import joined_gains, joined_results
from proper.evaluation.statistics import Effort
from proper.evaluation.style import user_habits
from proper.evaluation.truth import TruthShares, fits, truth_of_data, truth_section
from proper.files import hash_value, read_json, write_json
from proper.inference.loading import load
from proper.inference.model import PersonalizedModel
from proper.json_records import NUMBER, REMOVE_IT, read_record
from proper.models.memory import give_back_memory
from proper.run_folder import RunFolder, Stage, Tier

MEASURING_CODE = ("data", "layers", "models", "inference", "evaluation")
"""Parts of the package whose change measures the trained stages anew (`fingerprint.code_version`)."""

HISTORY_SAMPLE = 8
"""Newest history items per user on which overfitting is measured."""


@dataclass(frozen=True)
class MethodSpec:
    """A method to be evaluated.

    Attributes:
        answers: function from a seed to the method's predictions.
        cost: function from the first seed's predictions to the method's row of `cost`.
    """

    name: str
    answers: Callable[[int], MethodRun]
    cost: Callable[[MethodRun], Mapping[str, Any]]


@dataclass(frozen=True)
class _Shared:
    """The parts of the results that all tasks of a run share; see `RawResults`."""

    run: Mapping[str, Any]
    seconds: Mapping[str, float]
    cost: Sequence[Mapping[str, Any]]
    routing: Mapping[str, Any]
    user_slices: Mapping[str, set[str]]


@dataclass(frozen=True)
class Harness:
    """Evaluation of one run.

    Attributes:
        folders: the run folder of every seed; the first is the run's own.
        name: name of the one task that config and data are of, in a run of several.
    """

    config: Config
    dataset: Dataset
    folders: Mapping[int, Path]
    name: str = ""

    @property
    def home(self) -> Path:
        """The run folder itself."""
        return next(iter(self.folders.values()))

    @property
    def task(self) -> TaskInfo:
        """The task: name, kind and labels."""
        data, labels = self.config.data, tuple(self.dataset.labels)
        return TaskInfo(self.name or data.task or Path(data.path).stem, self.config.task.kind, labels, data.given_split)

    def evaluate(self, methods: Sequence[MethodSpec]) -> dict[str, Any]:
        """Run all methods on all queries, write the results and the report's files, and return the results.

        Raises:
            DataError: a query leaks into training, or no query is left.
            RunFolderError: a stage is missing.
        """
        require_queries(self.dataset)
        require_no_leaks(self.dataset)
        names = [method.name for method in methods]
        # Method by method, so that a killed process loses at most one method.
        by_method = {one.name: {seed: one.answers(seed) for seed in self.folders} for one in methods}
        detail = RunFolder(self.home).routing
        routing = self._cached("routing", self._routing, detail) if {Tier.GROUPS, Tier.USERS} & set(names) else None
        first = next(iter(self.folders))
        shared = _Shared(
            run=self._run_metadata(),
            seconds=self._seconds(),
            cost=[one.cost(by_method[one.name][first]) for one in methods],
            routing=routing or {},
            user_slices=self._user_slices(),
        )
        parts, gains = {}, {}
        for name, config in self.config.each_task.items():
            with one_task(self.dataset, name) as dataset:
                alone = replace(self, config=config, dataset=dataset, name=name)
                parts[name], gains[name] = alone._results(by_method, shared)
        results = joined_results(parts)
        if "users" in names:
            results["tiers"] = self._tiers()
        write_json(RunFolder(self.home).user_scores, plain(joined_gains(gains)))
        write_json(RunFolder(self.home).results, results)
        return results

    def _results(
        self, by_method: Mapping[str, Mapping[int, MethodRun]], shared: _Shared
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the results and the users' gains of one task."""
        predictions = {seed: self._answers(by_method, seed) for seed in self.folders}
        for seed, found in predictions.items():
            write_lamp_predictions(RunFolder(self.folders[seed]).predictions, found, self.config.data, self.task)
        losses = f"history_losses {self.name}".strip()
        history_losses = self._cached(losses, self._history_losses) if "users" in by_method else None
        raw = RawResults(
            predictions=predictions,
            task=self.task,
            run=shared.run,
            seconds=shared.seconds,
            cost=shared.cost,
            routing=shared.routing,
            truth=None if self.name else self._truth(predictions, shared.routing),
            history_losses=history_losses or {},
            user_slices=shared.user_slices,
            query_slices=self._query_slices(),
            habits=user_habits(self.dataset, self.config.task.kind),
        )
        results = build_results(raw, Effort(self.config.evaluation.resamples))
        wanted = self.config.evaluation.slices
        results["slices"] = [row for row in results["slices"] if wanted == "all" or row["slice"] in wanted]
        return results, gains_by_user(predictions, self.task)

    def _answers(self, by_method: Mapping[str, Mapping[int, MethodRun]], seed: int) -> dict[str, list[Prediction]]:
        """Return the predictions of one task and seed by method; methods that cannot answer the task have none."""
        found = {
            name: [row for row in runs[seed].predictions if row.task == self.name] for name, runs in by_method.items()
        }
        return {name: rows for name, rows in found.items() if rows}

    def _cached(self, what: str, measure: Callable[[], dict[str, Any]], *files: Path) -> dict[str, Any]:
        """Return a measure of the trained stages, cached under the hash of stages, data and code.

        It is measured again without one of the `files` that it also writes.
        """
        markers = [RunFolder(self.home).marker(stage) for stage in (Stage.GROUPS, Stage.USERS)]
        stages = [read_json(marker) for marker in markers if marker.exists()]
        served = served_version(RunFolder(self.home), self.dataset, tuple(Stage))
        key = hash_value([what, self.dataset.sha256, stages, served, code_version(*MEASURING_CODE)])
        path = RunFolder(self.home).analysis
        cached = read_record(path, REMOVE_IT) if path.exists() else {}
        found = cached.get(what) if all(each.exists() for each in files) else None
        if not isinstance(found, dict) or found.get("key") != key or not isinstance(found.get("value"), dict):
            found = {"key": key, "value": plain(measure())}
            write_json(path, {**cached, what: found})
        value: dict[str, Any] = found["value"]
        return value

    def _routing(self) -> dict[str, Any]:
        """Return the routing figures of the first seed, from the gates of stage 2, which learns the groups."""
        users = list(self.dataset.users("target"))
        ids = [user.id for user in users]
        model = load(self.home, Tier.GROUPS)
        by_task = {name: self._task_gates(model, name) for name in self.dataset.tasks}
        # Of several tasks, a user's gates are the mean over those that the user has.
        own = [[found[user] for found in by_task.values() if user in found] for user in ids]
        gates = (
            torch.stack([torch.stack(each).mean(0) for each in own])
            if by_task
            else mean_gates(model, self.dataset, ids)
        )
        embeddings = _embeddings(model, ids)
        model.close()
        del model
        give_back_memory()
        truth = self._read_truth()
        groups = {user: truth.groups[user] for user in ids if user in truth.groups} if truth else None
        histories = {user.id: user.history for user in users}
        routing, detail = analyze_routing(gates.numpy(), ids, embeddings.numpy(), histories, groups)
        write_json(RunFolder(self.home).routing, plain(detail))
        shares = {name: torch.stack(list(found.values())).numpy() for name, found in by_task.items() if found}
        return {**routing, **task_routing(shares)} if shares else routing

    def _task_gates(self, model: PersonalizedModel, name: str) -> dict[str, Tensor]:
        """Return the mean gates (M, E) of the target users on their histories of one task."""
        with one_task(self.dataset, name) as dataset:
            found = [user.id for user in self.dataset.users("target")]
            users = [user for user in found if (own := dataset.user(user)) is not None and own.history]
            return dict(zip(users, mean_gates(model, dataset, users), strict=True)) if users else {}

    def _history_losses(self) -> dict[str, float]:
        """Return the answer loss of every target user with a history on the newest of it, first seed."""
        model = load(self.home, Tier.USERS)
        losses = {}
        # Of several tasks, a user may have queries of one without a history of it.
        users = [user for user in self.dataset.users("target") if user.history]
        with progress("losses on the histories", len(users)) as advance:
            for user in users:
                own = answer_losses(model, self.dataset.history(user.id, HISTORY_SAMPLE))
                losses[user.id] = sum(own) / len(own)
                advance()
        model.close()
        return losses

    def _read_truth(self) -> TruthShares | None:
        return truth_of_data(Path(self.config.data.path), RunFolder(self.home).demo_truth)

    def _truth(
        self, predictions: Mapping[int, Mapping[str, Sequence[Prediction]]], routing: Mapping[str, Any] | None
    ) -> dict[str, Any] | None:
        truth, asked = self._read_truth(), next(iter(next(iter(predictions.values())).values()))
        if truth is None or not fits(truth, asked, self.task):
            return None
        return truth_section(truth, predictions, self.task, (routing or {}).get("nmi"))

    def _user_slices(self) -> dict[str, set[str]]:
        """Return the target users with no row in the stage 2 sample of the first seed (new users for stage 2)."""
        sample = stage_sample(self.dataset, "groups", self.config, next(iter(self.folders)))
        return {"new-to-groups": targets_outside(self.dataset, sample)}

    def _query_slices(self) -> dict[str, set[int]]:
        seen = queries_seen_by_others(self.dataset)
        unseen = {query.id for query in self.dataset.queries()} - seen
        return {"items-seen-by-others": seen, "items-unseen-by-others": unseen}

    def _run_metadata(self) -> dict[str, Any]:
        packages = ("proper-llm", "torch", "transformers", "peft", "accelerate")
        versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
        compute = self.config.compute
        device = "cuda" if torch.cuda.is_available() and compute.device != "cpu" else "cpu"
        values = self.config.model_dump()
        lowered = {name: values[name.split(".")[0]][name.split(".")[1]] for name in compute.cut}
        return {
            "backbone": self.config.backbone,
            "versions": versions,
            "data_sha256": self.dataset.sha256,
            "device": f"{device}, {torch.get_num_threads()} threads",
            **self._privacy(),
            **({"budget": {"time": compute.budget, "lowered": lowered}} if compute.budget is not None else {}),
        }

    def _privacy(self) -> dict[str, Any]:
        """Return the privacy record of stages 1 and 2, which stage 2 writes; empty without privacy."""
        marker = RunFolder(self.home).marker(Stage.GROUPS)
        stage = read_record(marker) if self.config.privacy.on and marker.exists() else {}
        return {"privacy": stage["privacy"]} if "privacy" in stage else {}

    def _seconds(self) -> dict[str, float]:
        """Return the wall time of each stage in seconds, summed over seeds."""
        found: Counter[str] = Counter()
        for folder in self.folders.values():
            for stage in Stage:
                marker = RunFolder(folder).marker(stage)
                if marker.exists():
                    found[str(stage)] += read_record(marker, seconds=NUMBER)["seconds"]
        return dict(found)

    def _tiers(self) -> dict[str, Any]:
        """Return the number of target users per serving tier, with the reasons, first seed."""
        store = AdapterStore(RunFolder(self.home).users.path)
        targets = {user.id for user in self.dataset.users("target")}
        served = [(tier, metadata) for user, tier, metadata, _ in store.metadata() if user in targets]
        store.close()
        counts = Counter(tier for tier, _ in served)
        reasons = Counter(str(metadata["reason"]) for _, metadata in served if "reason" in metadata)
        sizes = {str(tier): counts[tier] for tier in (Tier.GROUPS, Tier.USERS)}
        return {**sizes, "reasons": dict(reasons.most_common())}


def _embeddings(model: PersonalizedModel, users: Sequence[str]) -> Tensor:
    assert model.served is not None
    return model.served.embeddings(users)
