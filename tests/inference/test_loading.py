"""A run folder, made by hand, as one model for all its users."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from proper.adapters.store import AdapterStore, UserRecord
from proper.config import UsersConfig
from proper.data.batching import by_length
from proper.errors import InputError, ProperError, RunFolderError
from proper.files import write_json
from proper.inference.generate import generate, respond
from proper.inference.loading import load
from proper.inference.model import PersonalizedModel
from proper.inference.score import score, score_labels
from proper.layers.batch_context import RowContext
from proper.models.backbone import Backbone
from proper.models.checkpoints import save_tensors
from proper.models.personal import ProperModel

PROMPTS = ["What does this say?", "Short", "A rather longer text than both of the others: what does it say?", "Well?"]
USERS: list[str | None] = ["own", "group", "stranger", None]
ALL: list[str | None] = ["own", "group", "other", "own"]


def config(backbone: Path, **compute: Any) -> dict[str, Any]:
    return {
        "data": {"path": "nothing.jsonl"},
        "task": {"max_new_tokens": 6},
        "backbone": str(backbone),
        "compute": {"dtype": "fp32", "max_length": 64, "batch_size": 3, "device": "cpu", **compute},
        "groups": {"user_embedding": 16},
    }


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    backbone: Callable[..., Backbone],
    personal: Callable[..., ProperModel],
) -> Path:
    """A run folder with users of both tiers: `own` and `other` have adapters, `group` has none."""
    folder, place = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("backbone")
    tiny = backbone()
    tiny.model.save_pretrained(place)
    tiny.tokenizer.save_pretrained(place)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(place)), encoding="utf-8")
    lora = get_peft_model(tiny.model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    lora.save_pretrained(str(folder / "population"))
    model = personal()
    draw = torch.Generator().manual_seed(8)
    vectors = {name: 0.5 * torch.randn(16, generator=draw) for name in ("own", "other", "group", "mean")}
    save_tensors(
        folder / "groups" / "groups.safetensors", {**model.group_parameters(), "mean_embedding": vectors["mean"]}, {}
    )
    layer = next(iter(model.layers.values()))
    assert layer.bank is not None
    store = AdapterStore(folder / "users")
    adapters = [layer.bank.layout.unpack(layer.bank.values[slot]) for slot in (0, 1)]
    store.put(
        [
            UserRecord("own", "users", vectors["own"], adapters[0]),
            UserRecord("other", "users", vectors["other"], adapters[1]),
            UserRecord("group", "groups", vectors["group"]),
        ]
    )
    store.close()
    save_tensors(folder / "users" / "router.safetensors", model.router_parameters(), {})
    for stage in ("population", "groups", "users"):
        write_json(folder / stage / "stage.json", {"seed": 0})
    return folder


@pytest.fixture
def model(run: Path) -> Iterator[PersonalizedModel]:
    loaded = load(run)
    yield loaded
    loaded.close()


def test_who_answers(model: PersonalizedModel) -> None:
    answers = respond(model, PROMPTS, USERS)
    assert [answer.tier for answer in answers] == ["users", "groups", "none", "none"]
    assert [answer.user for answer in answers] == USERS
    assert generate(model, PROMPTS, USERS) == [answer.text for answer in answers]


def test_a_mixed_batch_answers_as_each_user_alone(model: PersonalizedModel) -> None:
    together = generate(model, PROMPTS * 2, ALL + USERS)
    for prompt, user, text in zip(PROMPTS * 2, ALL + USERS, together, strict=True):
        assert generate(model, [prompt], [user]) == [text]
    same = generate(model, [PROMPTS[0]] * 4, ["own", "other", "group", "stranger"])
    assert len(set(same)) == 4, "each user has an answer of their own"


def test_unknown_users_get_the_mean_embedding_and_no_slot(model: PersonalizedModel) -> None:
    served = model.served
    assert served is not None
    found = served.embeddings(["own", None, "stranger", "group"])
    records = [served.store.get(user) for user in ("own", "group")]
    assert all(
        record is not None and torch.equal(row, record.embedding)
        for record, row in zip(records, found[[0, 3]], strict=True)
    )
    assert torch.equal(found[1], served.mean) and torch.equal(found[2], served.mean)
    assert served.slots(["own", None, "stranger", "group", "own"]) == [0, -1, -1, -1, 0]
    assert [served.tier(user) for user in ("own", "group", "stranger", None)] == ["users", "groups", "none", "none"]


def test_scores_are_those_of_the_tier(run: Path, model: PersonalizedModel) -> None:
    labels = ["yes", "no, not at all", "perhaps"]
    found = score(model, PROMPTS, USERS, labels)
    tokens = [model.encoder.answer(label) for label in labels]
    room = max(len(label) for label in tokens)
    served = model.served
    assert served is not None
    for at, user in enumerate(USERS):
        ids = [model.encoder.prompt(PROMPTS[at], room=room)]
        rows = RowContext("groups", embedding=served.mean.unsqueeze(0))
        if user in ("own", "group"):
            record = served.store.get(user)
            assert record is not None
            rows = RowContext("groups", embedding=record.embedding.unsqueeze(0))
            if record.adapter is not None:
                served.bank.layout.pack(record.adapter, served.bank.values[0])
                rows = RowContext("users", embedding=record.embedding.unsqueeze(0), slots=torch.tensor([0]))
        assert found[at].tolist() == pytest.approx(score_labels(model.model, ids, tokens, rows)[0].tolist(), abs=1e-4)


def test_each_stage_adds_its_part_of_the_model(run: Path, model: PersonalizedModel) -> None:
    tiers, texts = {}, {}
    for stage in ("base", "population", "groups", "users"):
        at = load(run, stage)  # type: ignore[arg-type]
        tiers[stage] = [answer.tier for answer in respond(at, PROMPTS[:2], ["own", "stranger"])]
        texts[stage] = generate(at, PROMPTS, ["own"] * 4)
        at.close()
    assert tiers == {
        "base": ["base"] * 2,
        "population": ["population"] * 2,
        "groups": ["groups", "none"],
        "users": ["users", "none"],
    }
    assert texts["base"] == texts["population"], "this population adapter is zero"
    assert texts["population"] != texts["groups"] != texts["users"]
    assert texts["users"] == generate(model, PROMPTS, ["own"] * 4)


def test_what_is_wrong_with_a_question(model: PersonalizedModel) -> None:
    with pytest.raises(InputError, match="2 prompts and 1 user ids"):
        generate(model, ["a", "b"], ["own"])
    with pytest.raises(InputError, match="a prompt is empty"):
        generate(model, ["a", " \n"], ["own", "own"])
    assert generate(model, [], []) == []


def test_a_prompt_longer_than_the_model_is_cut(model: PersonalizedModel) -> None:
    answers = generate(model, ["word " * 500 + "What now?", "🎈 שלום " * 100], ["own", None])
    assert len(answers) == 2


def test_asking_for_more_tokens_than_fit_leaves_the_prompt_half_the_length(model: PersonalizedModel) -> None:
    ids = model.encoder.prompt("What does this say?", room=500)
    assert ids == model.encoder.prompt("What does this say?")
    assert len(model.encoder.prompt("word " * 500, room=500)) == 32


def test_folders_that_are_no_runs_or_have_not_got_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        load(tmp_path)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert load(tmp_path).stage == "base"
    for stage in ("population", "groups", "users"):
        with pytest.raises(RunFolderError, match=r"stage '\w+' is not trained yet; run: proper run") as error:
            load(tmp_path, stage)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no stage 'user'; stages are: base, population, groups, users"):
        load(run, "user")


def test_other_layers_than_the_trained_ones_are_one_clear_error(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    raw = yaml.safe_load((copy / "config.yaml").read_text(encoding="utf-8"))

    def complaint(**sections: Any) -> str:
        changed = raw | {name: raw.get(name, {}) | section for name, section in sections.items()}
        (copy / "config.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
        with pytest.raises(ProperError) as caught:
            load(copy)
        return str(caught.value)

    experts = copy / "groups" / "groups.safetensors"
    named = "its modules are not those of groups.target_modules and groups.layers: model.layers.0.mlp.down_proj.down"
    assert complaint(groups={"layers": 1}) == f"{experts}: {named}"
    assert complaint(groups={"layers": 3}).startswith("groups.layers: 3 is more than the 2 decoder layers")
    store = AdapterStore(copy / "users")
    store.bind(UsersConfig().adapter_shape)
    store.close()
    belongs = f"{copy / 'users'}: these adapters belong to another users.layers (all, not 1)"
    assert complaint(users={"layers": 1}) == belongs


def test_chunks_of_similar_length() -> None:
    assert by_length([5, 1, 9, 3, 7], 2, 99) == [[1, 3], [0, 4], [2]]
    assert by_length([5, 1, 9, 3, 7], 4, 10) == [[1, 3], [0], [4], [2]]
    assert by_length([], 4, 99) == []
