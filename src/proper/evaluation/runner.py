"""Inference for evaluation: predictions for all queries, loss of the true answers, and users' mean gates."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from proper.config import TaskConfig
from proper.console import Advance, progress
from proper.data.batching import by_length, collate
from proper.data.chat import readable
from proper.data.dataset import Dataset
from proper.data.encoder import EncodedExample
from proper.data.histories import TextExample
from proper.errors import ConfigError, RunFolderError
from proper.evaluation.metrics import Prediction
from proper.files import write_text
from proper.inference.generate import respond
from proper.inference.model import BatchModel, PersonalizedModel
from proper.inference.sampling import Sampling
from proper.inference.score import score
from proper.json_records import REMOVE_IT, first_problem
from proper.layers.batch_context import RowContext

CHUNK = 512
"""Number of queries in memory at once."""

_PREDICTION = TypeAdapter(Prediction)

GATE_ITEMS, MIN_GATE_ITEMS, MAX_GATE_ITEMS = 1024, 4, 32
"""History items over which mean gates are taken: of all users together, and the limits of one user's share of them.

Every item is a forward pass.
"""


@dataclass(frozen=True)
class MethodRun:
    """A method's predictions and their cost.

    Attributes:
        seconds: wall time without model loading.
        tokens: prompt and answer tokens processed by the model.
    """

    predictions: list[Prediction]
    seconds: float
    tokens: int


def predict(
    model: BatchModel, dataset: Dataset, task: TaskConfig, title: str, alias: Callable[[str], str] = str
) -> MethodRun:
    """Answer every query of the dataset with `model`, as its own user or as the user that `alias` maps it to.

    The dataset has one task; of several, `one_task` opens each.
    """
    histories = {user.id: user.history for user in dataset.users("target")}
    queries = list(dataset.queries())
    started, found = time.perf_counter(), []
    with progress(f"evaluate: {title}", len(queries)) as advance:
        for at in range(0, len(queries), CHUNK):
            chunk = queries[at : at + CHUNK]
            asked = [replace(query, user=alias(query.user)) for query in chunk]
            for query, answered in zip(chunk, _answers(model, asked, task, dataset.labels, advance), strict=True):
                tier = model.tier(alias(query.user))
                history = histories.get(query.user, 0)
                found.append(replace(prediction_of(query, "", tier, history), tokens=query.tokens, **asdict(answered)))
    return MethodRun(found, time.perf_counter() - started, sum(p.tokens for p in found))


@dataclass(frozen=True)
class _Answer:
    """The part of a `Prediction` that the model decides."""

    prediction: str
    loss: float
    label_loss: float | None = None
    label_scores: list[float] | None = None


def _answers(
    model: BatchModel, queries: Sequence[TextExample], task: TaskConfig, labels: Sequence[str], advance: Advance
) -> list[_Answer]:
    prompts, users = [q.prompt for q in queries], [q.user for q in queries]
    if not task.scored:
        if not isinstance(model, PersonalizedModel):
            raise ConfigError("task.decode: this method scores labels and cannot generate; set it to score")
        room = Sampling(task.max_new_tokens)
        texts = [answer.text for answer in respond(model, prompts, users, room, advance, queries[0].task)]
        return [_Answer(*pair) for pair in zip(texts, answer_losses(model, queries), strict=True)]
    scores = score(model, prompts, users, labels, advance, queries[0].task)
    losses = _losses_from(model, scores, queries, labels)
    chosen = zip(likely_labels(scores, task, labels), losses, label_losses(scores, queries, labels), strict=True)
    return [_Answer(*row, [round(one, 4) for one in own.tolist()]) for row, own in zip(chosen, scores, strict=True)]


def likely_labels(scores: Float[Tensor, "B L"], task: TaskConfig, labels: Sequence[str]) -> list[str]:
    """Return the answers from the labels' log-likelihoods: the most likely label, or the median rating."""
    chosen = likely_rating(scores, labels) if task.kind == "rating" else scores.argmax(1).tolist()
    return [labels[at] for at in chosen]


def label_losses(
    scores: Float[Tensor, "B L"], queries: Sequence[TextExample], labels: Sequence[str]
) -> list[float | None]:
    """Return -log p(true label) of each query (nats), p normalized over the labels; None for an unknown label."""
    index = {label: at for at, label in enumerate(labels)}
    found = -scores.log_softmax(1, dtype=torch.float32)
    return [
        float(row[index[query.target]]) if query.target in index else None
        for row, query in zip(found, queries, strict=True)
    ]


def _losses_from(
    model: BatchModel, scores: Float[Tensor, "B L"], queries: Sequence[TextExample], labels: Sequence[str]
) -> list[float]:
    """Return the losses from the labels' log-likelihoods; the model runs only for true answers outside the labels."""
    tokens = {label: (at, len(model.encoder.answer(label))) for at, label in enumerate(labels)}
    strange = [query for query in queries if query.target not in tokens]
    others = iter(answer_losses(model, strange) if strange else [])
    losses = []
    for row, query in zip(scores, queries, strict=True):
        at, length = tokens.get(query.target, (-1, 0))
        losses.append(next(others) if at < 0 else -float(row[at]) / length)
    return losses


def likely_rating(scores: Float[Tensor, "B L"], labels: Sequence[str]) -> list[int]:
    """Return the index of the median of each row's rating distribution: the answer with the least expected MAE."""
    order = sorted(range(len(labels)), key=lambda i: float(labels[i]))
    cumulative = scores[:, order].softmax(1).cumsum(1)
    middle = (cumulative < 0.5).sum(1).clamp(max=len(order) - 1)
    return [order[i] for i in middle.tolist()]


def answer_losses(model: BatchModel, examples: Sequence[TextExample]) -> list[float]:
    """Return the mean loss per token (nats) of each example's true answer, in a conversation of its last message."""
    encoded = [model.encoder.encode(example, last=True) for example in examples]
    losses = [0.0] * len(encoded)
    limit = model.model.backbone.batch_tokens
    for chunk in by_length([len(row.ids) for row in encoded], model.config.compute.batch_size, limit):
        batch = collate([encoded[i] for i in chunk], model.model.backbone.pad_id, model.model.device)
        with torch.no_grad():
            total, tokens = model.model.answer_losses(batch, model.rows(batch.users))
        for i, loss in zip(chunk, (total / tokens).tolist(), strict=True):
            losses[i] = loss
    return losses


def mean_gates(
    model: BatchModel, dataset: Dataset, users: Sequence[str], items: int | None = None
) -> Float[Tensor, "U M E"]:
    """Return each user's mean gates in every module, over the tokens of their newest history items.

    By default a user has at most `gate_items` items.
    """
    found = []
    items = items or gate_items(len(users))
    limit = model.model.backbone.batch_tokens
    with progress("routing of the histories", len(users)) as advance:
        for user in users:
            rows = [model.encoder.encode(example) for example in dataset.history(user, items)]
            # The gates need the logits of no token; the model computes one per row.
            rows = [replace(row, start=len(row.ids) - 1, between=()) for row in rows]
            chunks = by_length([len(row.ids) for row in rows], items, limit)
            # The mean of one chunk is the user's, bit by bit; several are weighted by their tokens.
            parts = [_gates(model, [rows[at] for at in sorted(chunk)]) for chunk in chunks]
            shares = torch.tensor([tokens for _, tokens in parts], dtype=torch.float64)
            shares /= shares.sum()
            means = torch.stack([gates.double() * share for (gates, _), share in zip(parts, shares, strict=True)])
            found.append(means.sum(0).float())
            advance()
    return torch.stack(found)


def gate_items(users: int) -> int:
    """Return the most items of each user over which mean gates are taken."""
    return min(MAX_GATE_ITEMS, max(MIN_GATE_ITEMS, GATE_ITEMS // max(1, users)))


@torch.no_grad()
def _gates(model: BatchModel, rows: Sequence[EncodedExample]) -> tuple[Float[Tensor, "M E"], int]:
    """Return one user's mean gates in every module over these rows, and the number of their tokens."""
    batch = collate(rows, model.model.backbone.pad_id, model.model.device)
    wanted = model.rows(batch.users)
    who = torch.zeros(len(rows), dtype=torch.long, device=model.model.device)
    mask = batch.attention_mask.bool()
    model.model.answer_logits(batch, RowContext(wanted.mode, wanted.embedding, wanted.slots, users=who, mask=mask))
    return model.model.routing.stacked()[:, 0].cpu(), batch.tokens


def prediction_of(query: TextExample, answer: str, tier: str, history: int) -> Prediction:
    """Return the prediction row of a query and its answer, without a loss; see `Prediction`."""
    return Prediction(
        id=query.id,
        user=query.user,
        item=query.item,
        prompt=readable(query.prompt),
        target=query.target,
        prediction=answer,
        loss=None,
        tokens=0,
        tier=tier,
        history=history,
    )


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions as JSONL, atomically; those of a run of one task without the key `task`."""
    rows = (
        asdict(p) if p.task else {key: value for key, value in asdict(p).items() if key != "task"} for p in predictions
    )
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_predictions(path: Path, *, label_scores: bool = False) -> list[Prediction]:
    """Read what `write_predictions` wrote, without the labels' scores unless they are asked for.

    Raises:
        RunFolderError: a line is no prediction; the message names file and line.
    """
    found = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                one = _PREDICTION.validate_json(line, strict=True)
            except ValidationError as error:
                why = first_problem(error)
                raise RunFolderError(f"{path}:{number}: not a prediction: {why}; {REMOVE_IT}") from error
            found.append(one if label_scores else replace(one, label_scores=None))
    return found


Runs = Mapping[int, Mapping[str, Sequence[Prediction]]]
"""Predictions per seed and method."""
