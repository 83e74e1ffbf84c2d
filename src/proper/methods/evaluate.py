"""Evaluation of methods: train missing stages, predict once, and cache the predictions for the harness.

Predictions are cached in the run folder under a hash of all their inputs, so a repeated evaluation does not run models.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from proper.adapters.store import AdapterStore
from proper.config import Config
from proper.data.dataset import Dataset
from proper.data.derived.copies import cut_queries
from proper.data.one_task import one_task
from proper.errors import RunFolderError
from proper.evaluation.fingerprint import code_version, served_version
from proper.evaluation.harness import MethodSpec
from proper.evaluation.runner import MethodRun, read_predictions, write_predictions
from proper.export.converted_models import folded_size, int8_bytes
from proper.files import hash_value, read_json, write_json
from proper.inference.loading import load
from proper.json_records import NUMBER, REMOVE_IT, read_record
from proper.methods.derived_runs import require_own_stages, seconds_of, trained_run
from proper.methods.spec import Method, PerUser, TrainedRun
from proper.models.checkpoints import settled
from proper.models.memory import give_back_memory
from proper.run_folder import RunFolder, Stage, Tier

logger = logging.getLogger(__name__)

ANSWERING_CODE = ("data", "layers", "models", "adapters", "inference", "export", "methods", "evaluation/runner.py")
"""Parts of the package whose change answers the queries anew (`fingerprint.code_version`)."""


@dataclass(frozen=True)
class MethodEvaluator:
    """Evaluator of the methods of one run.

    Attributes:
        folders: the run folder of every seed; the first is the run's own.
        opened: open datasets of variants by path.
    """

    config: Config
    dataset: Dataset
    folders: Mapping[int, Path]
    opened: dict[Path, Dataset] = field(default_factory=dict)

    def specs(self, methods: Sequence[Method]) -> list[MethodSpec]:
        """Return the methods as `MethodSpec` for the harness.

        Raises:
            RunFolderError: a stage of the run that a method needs is missing; before any method is evaluated.
        """
        for method in methods:
            for folder in self.folders.values():
                require_own_stages(method, folder)
        return [self._spec(method) for method in methods]

    def _spec(self, method: Method) -> MethodSpec:
        runs: dict[int, TrainedRun] = {}
        made: list[MethodRun] = []

        def answers(seed: int) -> MethodRun:
            if made and not method.stages:
                return made[0]  # A method without training gives the same answers for every seed.
            config = settled(self.config, RunFolder(self.folders[seed]).experts)
            run = TrainedRun(config, self.dataset, self.folders[seed], seed)
            runs[seed] = trained_run(method, run, next(iter(self.folders.values())), self.opened)
            made.append(answered(method, runs[seed], RunFolder(self.folders[seed])))
            return made[-1]

        def cost(run: MethodRun) -> dict[str, Any]:
            return cost_row(method, next(iter(runs.values())), run)

        return MethodSpec(method.name, answers, cost)


@contextmanager
def evaluating(config: Config, dataset: Dataset, folders: Mapping[int, Path]) -> Iterator[MethodEvaluator]:
    """Yield an evaluator; close the datasets of variants on exit."""
    evaluator = MethodEvaluator(config, dataset, folders)
    try:
        yield evaluator
    finally:
        for opened in evaluator.opened.values():
            opened.close()


def answered(method: Method, trained: TrainedRun, run_folder: RunFolder, *, label_scores: bool = False) -> MethodRun:
    """Return a method's predictions: those cached in the run folder if their inputs are the same, else new ones.

    The labels' scores are left out, since all methods' predictions are in memory at once, unless they are asked for.

    Raises:
        RunFolderError: the file of cached predictions is damaged.
    """
    path = run_folder.predictions_of(method.name)
    beside = path.with_suffix(".json")
    key = _key(method, trained)
    if path.exists() and beside.exists():
        made = read_record(beside, REMOVE_IT, key=str, seconds=NUMBER, tokens=int)
        if made["key"] == key:
            found = read_predictions(path, label_scores=label_scores)
            _require_whole(path, len(found), made.get("answers"))
            logger.info(f"evaluate: {method.name} (seed {trained.seed}) reuses its predictions")
            return MethodRun(found, made["seconds"], made["tokens"])
    beside.unlink(missing_ok=True)
    run = _each_task(method, trained)
    give_back_memory()
    write_predictions(path, run.predictions)
    record = {"key": key, "seconds": run.seconds, "tokens": run.tokens, "answers": len(run.predictions)}
    write_json(beside, record)
    return run if label_scores else replace(run, predictions=[replace(p, label_scores=None) for p in run.predictions])


def _require_whole(path: Path, found: int, written: int | None) -> None:
    """Check that a file still has the predictions that were written; older runs do not say how many."""
    if not found or (written is not None and found != written):
        of = "" if written is None else f" of {written}"
        raise RunFolderError(f"{path}: holds {found}{of} predictions; {REMOVE_IT}")


def _each_task(method: Method, trained: TrainedRun) -> MethodRun:
    """Answer the queries, of several tasks each by itself; a task that the method cannot answer is left out."""
    if not trained.config.tasks:
        return method.answer(trained)
    found: list[MethodRun] = []
    for name, config in trained.config.each_task.items():
        if method.obstacle(config.task) is None:
            with one_task(trained.dataset, name) as dataset:
                run = method.answer(replace(trained, config=config, dataset=dataset))
            found.append(replace(run, predictions=[replace(p, task=name) for p in run.predictions]))
    predictions = [row for run in found for row in run.predictions]
    return MethodRun(predictions, sum(run.seconds for run in found), sum(run.tokens for run in found))


def cost_row(method: Method, trained: TrainedRun, run: MethodRun) -> dict[str, Any]:
    """Return the cost per user, as a mean over target users."""
    numbers, size, users = _kept(method, trained)
    own = [stage for stage in method.stages if stage != Stage.POPULATION][-1:]
    seconds = seconds_of(trained, own) / max(1, users) if method.keeps not in ("nothing", "history") else 0
    inherited = method.variant.inherits if method.variant is not None else ()
    return {
        "method": method.name,
        "parameters_per_user": numbers,
        "bytes_per_user": size,
        "train_seconds_per_user": round(seconds, 3),
        "tokens_per_second": round(run.tokens / run.seconds, 1),
        "tokens_per_query": round(run.tokens / max(1, len(run.predictions)), 1),
        "train_seconds": round(seconds_of(trained, [s for s in method.stages if s not in inherited]), 3),
        "truncated_prompts": cut_queries(trained.dataset) if method.stages or method.name == Tier.BASE else 0,
    }


def _kept(method: Method, trained: TrainedRun) -> tuple[int, int, int]:
    """Return parameters and bytes per user, and the number of users that the last stage trained."""
    targets = {user.id: user for user in trained.dataset.users("target")}
    if method.keeps == "nothing":
        return 0, 0, len(targets)
    if method.keeps == "history":
        texts = (item for user in targets for item in trained.dataset.history(user))
        return 0, round(sum(len((t.prompt + t.target).encode()) for t in texts) / len(targets)), len(targets)
    marker = read_record(RunFolder(trained.folder).marker(method.stages[-1]), users=int)
    if method.keeps == "export":
        return (*_exported(trained), marker["users"])
    with closing(AdapterStore(RunFolder(trained.folder).users.path)) as store:
        return (*_stored(store, method.keeps, targets), marker["users"])


def _stored(store: AdapterStore, keeps: PerUser, targets: Container[str]) -> tuple[int, int]:
    """Return parameters and bytes that a store has per user, as a mean over its target users."""
    held = [(user, tier, size) for user, tier, _, size in store.metadata() if user in targets]
    width = next((len(head.embedding) for user, _, _ in held if (head := store.head(user))), 0)
    if keeps == "embedding" or not held:
        return width, 4 * width
    adapted = [user for user, tier, _ in held if tier == Tier.USERS]
    record = store.get(adapted[0]) if adapted else None
    adapter = 0 if record is None else sum(tensor.numel() for tensor in (record.adapter or {}).values())
    if keeps == "int8":
        size = 4 * width * len(held) + len(adapted) * (0 if record is None else int8_bytes(record))
    else:
        size = sum(each for *_, each in held)
    return width + round(adapter * len(adapted) / len(held)), round(size / len(held))


def _exported(trained: TrainedRun) -> tuple[int, int]:
    """Return parameters and bytes of one exported adapter."""
    model = load(trained.folder, Tier.USERS)
    try:
        return folded_size(model)
    finally:
        model.close()


def _key(method: Method, trained: TrainedRun) -> str:
    markers = [RunFolder(trained.folder).marker(stage) for stage in method.stages]
    stages = [read_json(marker) for marker in markers]
    settings = trained.config.model_dump(exclude={"evaluation"})
    # A deletion removes rows, and the hash of the data stays; without the deleted users, others are answered anew.
    left = trained.dataset.connection.execute("SELECT count(*), sum(part = 'query') FROM rows").fetchone()
    data = [trained.dataset.sha256, *left]
    made_of = [method.name, settings, data, trained.seed, stages, code_version(*ANSWERING_CODE)]
    # The users of a variant do not change after its training.
    own = method.stages if method.variant is None else ()
    return hash_value([*made_of, served_version(RunFolder(trained.folder), trained.dataset, own)])
