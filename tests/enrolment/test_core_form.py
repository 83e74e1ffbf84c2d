"""A run whose users have cores between shared bases: trained, served, enrolled, updated, exported, deleted."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import proper
from proper.adapters.store import AdapterStore
from proper.config import Config
from proper.data.batching import collate
from proper.data.dataset import Dataset
from proper.data.encoder import EncodedExample
from proper.enrolment.fit_user import START_NEIGHBOURS
from proper.enrolment.neighbours import nearest_adapters
from proper.errors import InputError, RunFolderError, StoreError
from proper.export.run_export import export_user, import_user
from proper.inference.generate import generate
from proper.inference.loading import load
from proper.layers.bank import AdapterBank
from proper.models.checkpoints import save_tensors
from proper.run_folder import RunFolder
from proper.training.starts import mean_adapter
from tests.enrolment.conftest import train_run

WORDS = ["red", "green", "blue", "small", "large", "old", "new", "quiet", "loud", "round"]
RANK = 3


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"n{at}", "timestamp": 100 + at, "input": f"{WORDS[at % 10]} {WORDS[at * 3 % 10]} is", "output": "red"}
        for at in range(count)
    ]


@pytest.fixture(scope="module")
def trained(settings: Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiers = settings.users.tiers.model_copy(update={"select": False})
    users = {"form": "core", "rank": RANK, "steps": 6, "learning_rate": 2e-2, "router": "residual", "tiers": tiers}
    return train_run(settings, dataset, tmp_path_factory.mktemp("core") / "run", users)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_users_store_cores_and_a_mixed_batch_answers_as_each_user_alone(trained: Path) -> None:
    with closing(load(trained)) as model:
        served = model.served
        assert served is not None
        records = [served.store.get(user) for user, tier in served.store.users() if tier == "users"]
        assert len(records) > 2
        layers = 2
        for record in records:
            assert record is not None and record.adapter is not None
            assert {tuple(tensor.shape) for tensor in record.adapter.values()} == {(layers, RANK, RANK)}
            assert all(name.endswith(".C") for name in record.adapter)
        users = [record.user for record in records if record is not None]
        prompt = "red old is"
        together = model_scores(model, users, prompt)
        for user, row in zip(users, together, strict=True):
            assert torch.allclose(row, model_scores(model, [user], prompt)[0], atol=1e-5)
        assert len({tuple(row.tolist()) for row in together}) == len(users), "each user has scores of their own"
        assert generate(model, [prompt] * len(users), users) == [generate(model, [prompt], [each])[0] for each in users]


def model_scores(model: Any, users: list[str], prompt: str) -> torch.Tensor:
    ids = model.encoder.prompt(prompt)
    batch = collate([EncodedExample(user, (*ids, 5), len(ids)) for user in users], 0, model.model.device)
    with torch.no_grad():
        found: torch.Tensor = model.model.answer_logits(batch, model.rows(users))[:, 0]
    return found


def test_answers_are_those_of_the_plain_loras(trained: Path) -> None:
    with closing(load(trained)) as model:
        assert model.served is not None
        users = [user for user, tier in model.served.store.users() if tier == "users"]
        expected = model_scores(model, users, "red old is")
        config = model.config.users
        plain = model.model.user_layout(config.model_copy(update={"form": "lora"}))
        loras = AdapterBank(plain, model.served.bank.slots, alpha=config.alpha, trainable=False)
        for slot, row in enumerate(model.served.bank.values):
            plain.pack(model.served.bank.layout.factors(row.float()), loras.values[slot])
        model.model.use_bank(loras)
        assert torch.allclose(model_scores(model, users, "red old is"), expected, atol=1e-3)


def test_a_new_user_enrols_is_updated_and_leaves_with_the_bases_untouched(run: Path) -> None:
    bases = RunFolder(run).users.bases
    before = bases.read_bytes()
    with closing(proper.load(run)) as model:
        model.users.enrol("new", rows(8))
        served = model.personalized.served
        assert served is not None
        first = served.store.get("new")
        assert first is not None and first.adapter is not None and all(name.endswith(".C") for name in first.adapter)
        assert any(tensor.any() for tensor in first.adapter.values())
        model.users.update("new", [dict(row, id=f"m{at}", timestamp=200 + at) for at, row in enumerate(rows(6))])
        model.users.delete("new")
        assert served.store.head("new") is None
    assert bases.read_bytes() == before


def test_exports_have_the_core_or_its_lora_and_name_their_bases(run: Path, tmp_path: Path) -> None:
    with closing(AdapterStore(run / "users")) as store:
        user = next(name for name, tier in store.users() if tier == "users")
    export_user(run, user, tmp_path / "native")
    assert {name for name in load_file(tmp_path / "native" / "user.safetensors") if name.endswith(".C")}
    assert import_user(run, tmp_path / "native", name="copy").record.adapter is not None
    export_user(run, user, tmp_path / "peft", form="peft")
    assert any(name.endswith("lora_B.weight") for name in load_file(tmp_path / "peft" / "adapter_model.safetensors"))

    written = json.loads((tmp_path / "native" / "proper.json").read_text(encoding="utf-8"))
    written["origin"]["bases"] = "of another run"
    (tmp_path / "native" / "proper.json").write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(InputError, match="belongs to another bases"):
        import_user(run, tmp_path / "native", name="third")


def test_other_bases_or_none_are_one_clear_error(run: Path) -> None:
    path = RunFolder(run).users.bases
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    with pytest.raises(StoreError, match="another bases"):
        load(run)
    path.unlink()
    with pytest.raises(RunFolderError, match="bases.safetensors: is missing"):
        load(run)


@pytest.mark.parametrize("start", ["zero", "neighbours", "meta"])
def test_a_new_user_starts_where_the_run_says(run: Path, start: str) -> None:
    raw = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    raw["users"] |= {"start": start, "learning_rate": 1e-30}
    (run / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    with closing(load(run)) as loaded:
        meta = torch.full((loaded.model.user_layout(loaded.config.users).width,), 0.5)
    save_tensors(RunFolder(run).users.start, {"start": meta}, {})
    with closing(proper.load(run)) as model:
        served = model.personalized.served
        assert served is not None
        model.users.enrol("first", rows(6))
        model.users.enrol("new", rows(5))
        record = served.store.get("new")
        assert record is not None and record.adapter is not None
        layout = served.bank.layout
        found = torch.cat([record.adapter[name].flatten() for name in layout.stacks()]).float()
        near = nearest_adapters(served.store, "new", record.embedding, START_NEIGHBOURS)
        own = {user for user, tier in served.store.users() if tier == "users"} - {"first", "new"}
        assert len(near) == min(len(own), START_NEIGHBOURS), "users who enrolled are nobody's neighbours"
        expected = {"zero": torch.zeros_like(meta), "neighbours": mean_adapter(near, layout), "meta": meta}[start]
        assert torch.allclose(found, expected, atol=2e-3)
