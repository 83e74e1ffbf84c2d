"""Exports of a whole run, read by those they are for: PEFT on the exported backbone, and a copy of the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from proper import pipeline
from proper.adapters.store import AdapterStore, UserRecord
from proper.config import load_config
from proper.data.batching import Batch
from proper.data.dataset import Dataset
from proper.errors import InputError, RunFolderError, StoreError
from proper.export.converted_models import static_export
from proper.export.fold import fold
from proper.export.peft_format import adapter_config, to_peft
from proper.export.run_export import export_backbone, export_user, import_user
from proper.files import hash_file, read_json, write_json
from proper.inference.generate import generate
from proper.inference.loading import load
from proper.inference.model import PersonalizedModel, ServedUsers
from proper.layers.bank import AdapterBank
from proper.layers.layout import Layout
from proper.models.checkpoints import load_tensors, save_tensors
from proper.models.personal import ProperModel

CLOSE = {"rtol": 0, "atol": 1e-4}
ODD = "../a/b 🦊"
RANK, ALPHA, EXPERTS, GROUP_RANK, D = 2, 3.0, 3, 3, 8


def personalize(run: Path, users: list[str]) -> None:
    """Fill what two steps of training hardly moved, and add stage 3: all but the last user have an adapter."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * shape[-1] ** -0.5

    population = run / "population" / "adapter_model.safetensors"
    tensors = load_file(population)
    save_file({name: 0.5 * random(*t.shape) for name, t in tensors.items()}, population, metadata={"format": "pt"})
    trained = run / "population" / "stage.json"
    write_json(trained, {**read_json(trained), "sha256": hash_file(population)})
    groups = run / "groups" / "groups.safetensors"
    tensors, facts = load_tensors(groups)
    save_tensors(groups, {n: random(*t.shape) if t.dim() == 2 else t for n, t in tensors.items()}, facts)
    shapes = {m: (tensors[f"{m}.down"].shape[1], tensors[f"{m}.up"].shape[0]) for m in facts["modules"]}
    layout = Layout.of(shapes, RANK)
    store = AdapterStore(run / "users")
    for user in users:
        adapter = None if user == users[-1] else layout.unpack(0.5 * torch.randn(layout.width, generator=draw))
        tier: Any = "groups" if adapter is None else "users"
        store.put([UserRecord(user, tier, torch.randn(D, generator=draw), adapter, {"passes": 1})])
    store.close()
    routers = {name: random(EXPERTS, outputs) for name, (_, outputs) in shapes.items()}
    save_tensors(run / "users" / "router.safetensors", routers, {})
    write_json(run / "users" / "stage.json", {"seed": 0, "seconds": 1.0, "users": len(users)})


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def run(
    request: pytest.FixtureRequest, named: Callable[[str], Path], job: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of linear layers, and one of Conv1D whose attention shares a name with the adapted layers."""
    config = job.config(
        named(request.param),
        groups={"experts": EXPERTS, "rank": GROUP_RANK},
        users={"rank": RANK, "alpha": ALPHA},
        split={"target_users": 3},
    )
    folder = pipeline.run(config, tmp_path_factory.mktemp("run") / "run", stages=("population", "groups"))
    with Dataset.open(folder / "data.sqlite") as dataset:
        personalize(folder, [ODD, *(user.id for user in dataset.users("target"))])
    return folder


@pytest.fixture
def dataset(run: Path) -> Iterator[Dataset]:
    with Dataset.open(run / "data.sqlite") as opened:
        yield opened


@pytest.fixture
def targets(dataset: Dataset) -> list[str]:
    """Target users: all but the last have an adapter."""
    return [user.id for user in dataset.users("target")]


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    """The exported backbone."""
    export_backbone(run, run.parent / "backbone")
    return run.parent / "backbone"


def reload(merged: Path, adapter: Path | None = None) -> Any:
    plain = AutoModelForCausalLM.from_pretrained(merged, attn_implementation="eager")
    return plain.eval() if adapter is None else peft.PeftModel.from_pretrained(plain, str(adapter)).eval()


def logits(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
    return found * batch.attention_mask.unsqueeze(-1)


def ours(model: PersonalizedModel, batch: Batch, user: str | None) -> Tensor:
    with model.model.routing.use(model.rows([user] * len(batch.users))):
        return logits(model.model.backbone.model, batch)


def test_the_exported_backbone_is_stage_1_to_the_last_bit(run: Path, merged: Path, batch: Batch) -> None:
    model = load(run, "population")
    assert torch.equal(logits(reload(merged), batch), ours(model, batch, None))
    assert (ours(model, batch, None) - ours(load(run, "base"), batch, None)).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(merged)("a b").input_ids == model.encoder.tokenizer("a b").input_ids
    assert reload(merged).generation_config.eos_token_id == model.encoder.end
    assert {path.suffix for path in merged.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}


def test_peft_reads_the_folded_user(
    run: Path, merged: Path, dataset: Dataset, targets: list[str], batch: Batch, tmp_path: Path
) -> None:
    with static_export(run, dataset) as model:
        folded = {user: ours(model, batch, user) for user in targets}
        nobody = ours(model, batch, "nobody")
        # Rows of different users in one batch are what each is alone.
        mixed = [targets[at % len(targets)] for at in range(len(batch.users))]
        with model.model.routing.use(model.rows(mixed)):
            together = logits(model.model.backbone.model, batch)
    for at, user in enumerate(mixed):
        torch.testing.assert_close(together[at], folded[user][at], **CLOSE)
    for user in targets:
        export_user(run, user, tmp_path / "user", form="peft", force=True)
        theirs = logits(reload(merged, tmp_path / "user"), batch)
        torch.testing.assert_close(theirs, folded[user], **CLOSE)
        assert (theirs - nobody).abs().max() > 0.1
    torch.testing.assert_close(nobody, logits(reload(merged), batch), **CLOSE)


def test_the_peft_folder_is_what_servers_take(run: Path, targets: list[str], tmp_path: Path) -> None:
    export_user(run, targets[0], tmp_path / "user", form="peft")
    tensors, _ = load_tensors(tmp_path / "user" / "adapter_model.safetensors")
    config, said = read_json(tmp_path / "user" / "adapter_config.json"), read_json(tmp_path / "user" / "proper.json")
    model = load(run).model
    names = {f"base_model.model.{name}.lora_{side}.weight" for name in model.layers for side in "AB"}
    assert tensors.keys() == names
    assert {min(tensor.shape) for tensor in tensors.values()} == {16}
    assert config["r"] == config["lora_alpha"] == 16
    assert said["rank"] == EXPERTS * GROUP_RANK + RANK
    transposed = isinstance(next(iter(model.layers.values())).base, Conv1D)
    assert config["fan_in_fan_out"] == transposed
    assert config["target_modules"] == (["c_fc", "mlp.c_proj"] if transposed else ["down_proj", "gate_proj", "up_proj"])
    assert (said["user"], said["tier"]) == (targets[0], "users")
    assert all(sum(gates) == pytest.approx(1, abs=1e-5) for gates in said["gates"].values())


def test_a_user_lora_alone_is_exact_in_peft(
    run: Path, merged: Path, dataset: Dataset, targets: list[str], batch: Batch, tmp_path: Path
) -> None:
    config = load_config(run / "config.yaml")
    base, store = load(run, "population"), AdapterStore(run / "users")
    plain = ProperModel(base.model.backbone)
    plain.add_plain_targets(config.groups)
    bank = AdapterBank(plain.layout(RANK), 2, alpha=ALPHA, trainable=False)
    plain.use_bank(bank)
    model = PersonalizedModel(plain, base.encoder, config, ServedUsers(store, bank, torch.zeros(D)), "users")
    loras = fold(model, targets[0], dataset.history(targets[0])).loras
    assert {lora.rank for lora in loras.values()} == {RANK}
    modules = [name for name, _ in reload(merged).named_modules()]
    save_file(to_peft(loras), tmp_path / "adapter_model.safetensors")
    transposed = isinstance(next(iter(plain.layers.values())).base, Conv1D)
    write_json(tmp_path / "adapter_config.json", adapter_config(loras, modules, fan_in_fan_out=transposed))
    expected = ours(model, batch, targets[0])
    torch.testing.assert_close(logits(reload(merged, tmp_path), batch), expected, **CLOSE)
    assert (expected - ours(model, batch, None)).abs().max() > 0.1
    store.close()


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The same run without its users."""
    place = tmp_path / "copy"
    shutil.copytree(run, place, ignore=shutil.ignore_patterns("users.sqlite*", "blobs"))
    return place


@pytest.mark.parametrize("which", [ODD, 0, -1])
def test_a_user_answers_the_same_in_a_copy_of_the_run(
    run: Path, copy: Path, targets: list[str], batch: Batch, tmp_path: Path, which: str | int
) -> None:
    user = which if isinstance(which, str) else targets[which]
    export_user(run, user, tmp_path / "out")
    taken = import_user(copy, tmp_path / "out")
    assert taken.record.user == user
    assert taken.same_router
    here, there = load(run), load(copy)
    assert there.tier(user) == here.tier(user)
    assert torch.equal(ours(there, batch, user), ours(here, batch, user))
    assert generate(there, ["What now?"], [user]) == generate(here, ["What now?"], [user])
    with pytest.raises(InputError, match=r"has a user .* already; --force replaces them, --user names another"):
        import_user(copy, tmp_path / "out")
    import_user(copy, tmp_path / "out", force=True)
    import_user(copy, tmp_path / "out", name="someone else")
    assert torch.equal(ours(load(copy), batch, "someone else"), ours(here, batch, user))


def test_an_id_that_is_nobodys_is_not_imported(run: Path, copy: Path, targets: list[str], tmp_path: Path) -> None:
    export_user(run, targets[0], tmp_path / "out")
    for user in ("", "nan", "a\ud83d", "x" * 513):
        with pytest.raises(InputError, match=r"out: user '.*; --user names another"):
            import_user(copy, tmp_path / "out", name=user)
    description = read_json(tmp_path / "out" / "proper.json")
    (tmp_path / "out" / "proper.json").write_text(json.dumps(description | {"user": "a\ud83d"}), encoding="utf-8")
    with pytest.raises(InputError, match=r"out: user 'a\\ud83d': half of a surrogate pair"):
        import_user(copy, tmp_path / "out")
    assert not list(AdapterStore(copy / "users").users())


def test_another_backbone_population_or_groups_is_refused_with_the_reason(
    run: Path, copy: Path, targets: list[str], tmp_path: Path
) -> None:
    export_user(run, targets[0], tmp_path / "out")

    def refused(reason: str) -> None:
        with pytest.raises(InputError, match=f"out: belongs to another {reason}"):
            import_user(copy, tmp_path / "out")
        assert not list(AdapterStore(copy / "users").users())

    groups = copy / "groups" / "groups.safetensors"
    before = groups.read_bytes()
    tensors, facts = load_tensors(groups)
    save_tensors(groups, {**tensors, "mean_embedding": tensors["mean_embedding"] + 1}, facts)
    refused("groups")
    groups.write_bytes(before)
    marker = copy / "groups" / "stage.json"
    write_json(marker, {**read_json(marker), "backbone": "other"})
    refused("backbone")
    write_json(marker, read_json(run / "groups" / "stage.json"))
    (copy / "population" / "adapter_model.safetensors").write_bytes(b"other")
    refused("population")


def test_groups_that_do_not_say_which_modules_they_adapt_are_named(
    run: Path, targets: list[str], tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(run, tmp_path / "mine"))
    groups = mine / "groups" / "groups.safetensors"
    tensors, metadata = load_tensors(groups)
    save_tensors(groups, tensors, {name: value for name, value in metadata.items() if name != "modules"})
    export_user(mine, targets[0], tmp_path / "out")
    with pytest.raises(StoreError, match=r"groups\.safetensors: its metadata has no list of modules"):
        import_user(mine, tmp_path / "out", force=True)


def test_a_stage_that_names_no_backbone_is_refused_in_one_line(copy: Path, targets: list[str], tmp_path: Path) -> None:
    write_json(copy / "groups" / "stage.json", {"seed": 0})
    with pytest.raises(RunFolderError, match=r"groups/stage\.json: key 'backbone' is missing"):
        export_user(copy, targets[0], tmp_path / "out")


def test_another_router_is_told(run: Path, copy: Path, targets: list[str], tmp_path: Path) -> None:
    export_user(run, targets[0], tmp_path / "out")
    (copy / "users" / "router.safetensors").unlink()
    shutil.copy(run / "groups" / "groups.safetensors", copy / "users" / "router.safetensors")
    assert not import_user(copy, tmp_path / "out").same_router


def test_tensors_of_another_shape_never_reach_the_store(
    run: Path, copy: Path, targets: list[str], tmp_path: Path
) -> None:
    export_user(run, targets[0], tmp_path / "out")
    config = (copy / "config.yaml").read_text(encoding="utf-8")
    facts = read_json(tmp_path / "out" / "proper.json")
    (copy / "config.yaml").write_text(config.replace(f"rank: {RANK}\n", f"rank: {RANK + 1}\n"), encoding="utf-8")
    facts["origin"]["rank"] = str(RANK + 1)
    write_json(tmp_path / "out" / "proper.json", facts)
    with pytest.raises(InputError, match=r"out: .* has shape"):
        import_user(copy, tmp_path / "out")


def test_what_cannot_be_exported_leaves_nothing(run: Path, targets: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="there is no user 'nobody'"):
        export_user(run, "nobody", out)
    with pytest.raises(InputError, match="has no history in this run"):
        export_user(run, ODD, out, form="peft")
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export_user(run, targets[0], out)
    for refused in (out, out / "diary.txt"):
        with pytest.raises(InputError, match="is not an earlier export"):
            export_user(run, targets[0], refused, force=True)
    assert (out / "diary.txt").read_text() == "mine"
    (run.parent / "begun").mkdir(exist_ok=True)
    shutil.copy(run / "config.yaml", run.parent / "begun")
    with pytest.raises(RunFolderError, match="stage 'groups' is not trained yet"):
        export_user(run.parent / "begun", targets[0], tmp_path / "other")


def test_static_export_is_a_method(run: Path) -> None:
    results = pipeline.evaluate(run, ["groups", "users", "static-export"])
    methods = {row["method"] for row in results["metrics"] if not row.get("trivial")}
    assert methods == {"groups", "users", "static-export"}
    assert ("users", "static-export") in {(row["method"], row["against"]) for row in results["comparisons"]}
    cost = {row["method"]: row for row in results["cost"]}
    assert cost["static-export"]["bytes_per_user"] == 4 * cost["static-export"]["parameters_per_user"] > 0
    predicted = {m: (run / "predictions" / f"{m}.jsonl").read_text() for m in ("groups", "users", "static-export")}
    assert len(set(predicted.values())) == 3
    assert "Static export" in pipeline.report(run).read_text(encoding="utf-8")
