"""PEFT's Poly as a stage-2 baseline: stage 2's tokens, every row's own task, and who is answered with the mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PolyConfig, get_peft_model

from proper import pipeline
from proper.adapters.store import AdapterStore, UserRecord
from proper.config import Config, GroupsConfig
from proper.data.batching import collate
from proper.data.dataset import Dataset
from proper.errors import ConfigError
from proper.evaluation.runner import answer_losses
from proper.inference.score import score
from proper.methods.poly import PolyStage, load_poly
from proper.methods.poly_layers import add_poly
from proper.methods.spec import TrainedRun
from proper.models.answer_loss import answer_loss
from proper.models.backbone import Backbone, load_backbone
from proper.models.checkpoints import load_tensors, save_tensors
from proper.models.peft_merge import apply_population
from proper.models.personal import ProperModel
from tests.methods.conftest import steps_of


@pytest.fixture(scope="module")
def place(run: Path, settings: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainedRun]:
    """A copy of the run in which Poly was trained and scored."""
    folder = tmp_path_factory.mktemp("poly") / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("variants", "predictions"))
    pipeline.evaluate(folder, ["population", "groups", "poly"])
    (variant,) = (folder / "variants").glob("poly-*")
    with Dataset.open(folder / "data.sqlite") as dataset:
        yield TrainedRun(settings(), dataset, variant, 0)


def test_it_sees_the_tokens_of_stage_2_and_a_user_is_a_row_of_logits(place: TrainedRun) -> None:
    home = place.folder.parents[1]
    assert steps_of(place.folder, "poly") == steps_of(home, "groups") != []
    own, stage = (json.loads((at / "groups" / "stage.json").read_text()) for at in (home, place.folder))
    assert (own["tokens"], own["rows"], own["users"]) == (stage["tokens"], stage["rows"], stage["users"])
    tensors, facts = load_tensors(place.folder / "groups" / "poly.safetensors")
    first = facts["modules"][0]
    assert tensors[f"{first}.a"].shape[1] == 3 and tensors[f"{first}.a"].shape[3] == place.config.groups.rank
    results = json.loads((home / "results.json").read_text(encoding="utf-8"))
    cost = {row["method"]: row for row in results["cost"]}["poly"]
    assert cost["parameters_per_user"] == 3 * len(facts["modules"]) == len(tensors["mean_logits"])
    assert ("groups", "poly") in [(row["method"], row["against"]) for row in results["comparisons"]]


def test_every_row_is_scored_with_its_own_users_task(place: TrainedRun, tmp_path: Path) -> None:
    """Against PEFT's own forward pass with `task_ids`, with skills and logits far from where they begin."""
    strong = replace(place, folder=tmp_path / "strong")
    shutil.copytree(place.folder, strong.folder)
    tensors, facts = load_tensors(place.folder / "groups" / "poly.safetensors")
    draw = torch.Generator().manual_seed(0)
    tensors = {name: 0.5 * torch.randn(tensor.shape, generator=draw) for name, tensor in tensors.items()}
    save_tensors(strong.folder / "groups" / "poly.safetensors", tensors, facts)
    queries = list(place.dataset.queries())
    users = sorted({query.user for query in queries})
    logits = 3 * torch.randn(len(users), len(tensors["mean_logits"]), generator=draw)
    store = AdapterStore(strong.folder / "users")
    store.put(UserRecord(user, "groups", logits[at]) for at, user in enumerate(users))
    store.close()
    peft = rebuilt(strong, tensors, facts["modules"], logits)
    model = load_poly(strong)
    batch = collate([model.encoder.encode(query) for query in queries], 0)
    tasks = torch.tensor([users.index(query.user) for query in queries])
    losses = []
    for given in (tasks, tasks.roll(1)):
        inputs = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad():
            logits_of_answers = peft(**inputs, task_ids=given).logits[:, -batch.labels.shape[1] - 1 : -1]
        total, tokens = answer_loss(logits_of_answers, batch.labels)
        losses.append((total / tokens).tolist())
    assert answer_losses(model, queries) == pytest.approx(losses[0], abs=1e-4)
    assert answer_losses(model, queries) != pytest.approx(losses[1], abs=1e-2)
    # Labels are scored with the prompt's cache, many to a row, and with the same task.
    prompts, asked = [query.prompt for query in queries], [query.user for query in queries]
    scores = score(model, prompts, asked, ["red", "green", "blue"])
    alone = [score(model, [query.prompt], [query.user], ["red", "green", "blue"])[0] for query in queries]
    assert torch.allclose(scores, torch.stack(alone), atol=1e-4)


def rebuilt(place: TrainedRun, tensors: dict[str, Any], modules: list[str], logits: torch.Tensor) -> Any:
    """The same Poly through PEFT alone."""
    backbone = load_backbone(place.config.backbone, torch.float32, torch.device("cpu"))
    apply_population(backbone, place.folder / "population")
    shape = {"r": place.config.groups.rank, "n_skills": 3, "n_tasks": len(logits)}
    wrapped = get_peft_model(backbone.model, PolyConfig(task_type="CAUSAL_LM", target_modules=modules, **shape)).eval()
    for at, name in enumerate(modules):
        layer = backbone.model.get_submodule(name)
        layer.poly_lora_A["default"].data.copy_(tensors[f"{name}.a"])
        layer.poly_lora_B["default"].data.copy_(tensors[f"{name}.b"])
        layer.poly_router["default"].module_logits.data.copy_(logits[:, 3 * at : 3 * at + 3])
    return wrapped


def test_who_was_not_seen_is_answered_with_the_mean_of_the_others(place: TrainedRun) -> None:
    model = load_poly(place)
    known = next(iter(model.tasks))
    labels = ["red", "green"]
    scores = [score(model, ["red green is"], [user], labels) for user in ("nobody", None, known)]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
    assert [model.tier(user) for user in ("nobody", None, known)] == ["none", "none", "groups"]
    tensors, _ = load_tensors(place.folder / "groups" / "poly.safetensors")
    store = AdapterStore(place.folder / "users")
    held = torch.stack([store.head(user).embedding for user, _ in store.users()])  # type: ignore[union-attr]
    store.close()
    assert torch.allclose(tensors["mean_logits"], held.mean(0))
    # Known and unknown users in one batch do not disturb each other.
    both = score(model, ["red green is"] * 2, [known, "nobody"], labels)
    assert torch.allclose(both, torch.cat([scores[2], scores[0]]), atol=1e-5)


def test_logits_of_absent_users_do_not_move(backbone: Callable[..., Backbone], place: TrainedRun) -> None:
    model = ProperModel(backbone())
    poly = add_poly(model, GroupsConfig(experts=3, rank=2), 4, seed=1)
    stage = PolyStage(model, poly, ["ann", "bob", "eve"], rate=0.1)
    before = poly.logits()
    for parameter in (*poly.skills().values(), *poly.tables()):
        parameter.requires_grad_(True)
    for parameter in poly.skills().values():
        parameter.data.normal_(0, 0.1)
    poly.sample(True)
    rows = [row for row in place.dataset.history("bob", 3)]
    batch = collate([load_poly(place).encoder.encode(row) for row in rows], 0)
    stage.loss(batch, 0.0).total.backward()
    stage.after_backward(1.0)
    moved = (poly.logits() != before).any(dim=1)
    assert moved.tolist() == [False, True, False, False]
    assert torch.equal(poly.logits()[:3], stage.logits) and stage.optimizer.steps.tolist() == [0, 1, 0]
    assert all(table.grad is None for table in poly.tables())


def test_a_layer_that_is_not_linear_is_refused(tiny_gpt2: Backbone) -> None:
    with pytest.raises(ConfigError, match="'poly' adapts torch.nn.Linear only; .* is Conv1D"):
        add_poly(ProperModel(tiny_gpt2), GroupsConfig(), 2, seed=0)


@pytest.fixture
def tiny_gpt2(backbone: Callable[..., Backbone]) -> Backbone:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64, bos_token_id=1, eos_token_id=2))
    return Backbone("gpt2", model, backbone().tokenizer, "0")
