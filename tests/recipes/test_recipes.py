"""The recipes run in sequence, learn, and compute what the library computes from the same weights.

The fast tests run them in this process on a tiny random backbone; the slow one as a reader would, on `proper-nano`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from proper.config import ConstraintConfig, GroupsConfig, UsersConfig
from proper.data.batching import Batch, collate
from proper.data.encoder import EncodedExample, Encoder
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import RowContext
from proper.layers.experts import Experts
from proper.models import Backbone, ProperModel, load_backbone
from proper.models.backbone import EMBEDDED, backbone_location
from proper.models.checkpoints import load_tensors
from proper.models.peft_merge import apply_population
from proper.training.groups import GroupsStage

FOLDER = Path(__file__).parents[2] / "recipes"
SEQUENCE = ("stage1_population", "stage2_groups", "stage3a_users", "stage3b_router")
USERS = 6


def load_recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Told:
    """What a recipe printed: training losses, and held-out losses from before training on."""

    text: str

    @property
    def losses(self) -> list[float]:
        return [float(x) for x in re.findall(r"^(?:step|epoch).*: loss (\S+?)(?:,|$)", self.text, flags=re.MULTILINE)]

    @property
    def held_out(self) -> list[float]:
        return [float(x) for x in re.findall(r"held-out loss (\S+),", self.text)]


Run = Callable[..., Told]


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama small enough for a fast test, with the tokenizer of `proper-nano`."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 8192, "max_position_embeddings": 128}
    config = LlamaConfig(tie_word_embeddings=True, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone_location(EMBEDDED)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(backbone_folder: Path) -> Run:
    def start(name: str, out: Path, **constants: Any) -> Told:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(FOLDER)
            recipe = load_recipe(name)
        vars(recipe).update({"OUT": out, "BACKBONE": str(backbone_folder), "USERS": USERS, **constants})
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            recipe.main()
        return Told(printed.getvalue())

    return start


@pytest.fixture(scope="module")
def finished(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Told]]:
    """The folder after all four recipes, and what they printed."""
    out = tmp_path_factory.mktemp("recipes")
    # A backbone this narrow needs large steps.
    return out, {name: run(name, out, EPOCHS=3, RATE=2e-2) for name in SEQUENCE}


def test_losses_fall(finished: tuple[Path, dict[str, Told]]) -> None:
    _, told = finished
    for name in SEQUENCE[:-1]:
        assert told[name].losses[-1] < 0.99 * told[name].losses[0], name
    # W_r alone cannot do much; its batches differ by more than it gains. So look at the same rows before and after.
    assert told["stage3b_router"].held_out[-1] != told["stage3b_router"].held_out[0]


def test_each_stage_begins_where_the_one_before_ended(finished: tuple[Path, dict[str, Told]]) -> None:
    _, told = finished
    ends = [told[name].held_out[-1] for name in SEQUENCE[:-1]]
    starts = [told[name].held_out[0] for name in SEQUENCE[1:]]
    # Merging stage 1 into bf16 weights rounds them; the other two start from nothing added, to the bit.
    assert starts[0] == pytest.approx(ends[0], abs=0.02)
    assert starts[1:] == ends[1:]


def demo_rows(
    backbone: Backbone, folder: Path
) -> tuple[dict[str, list[EncodedExample]], dict[str, list[EncodedExample]]]:
    """Everybody's history and queries, as the recipes have them."""
    history, queries = load_recipe("demo_rows").demo_rows(folder, USERS, 0, Encoder(backbone.tokenizer, 128))
    return history, queries


def group_model(out: Path, folder: Path) -> tuple[ProperModel, Tensor, dict[str, int]]:
    """The library's model with the weights of stage 2's recipe, the embeddings, and every user's number."""
    backbone = load_backbone(str(folder), torch.bfloat16, torch.device("cpu"))
    apply_population(backbone, out / "population")
    model = ProperModel(backbone)
    model.add_experts(GroupsConfig(), seed=7)
    tensors, metadata = load_tensors(out / "groups.safetensors")
    for name, parameter in model.group_parameters().items():
        parameter.data.copy_(tensors[name])
    return model, tensors["embeddings"], {user: at for at, user in enumerate(metadata["users"])}


def held_out(model: ProperModel, out: Path, rows_of: Callable[[Tensor], RowContext], numbers: dict[str, int]) -> float:
    """Mean loss per answer token, one row at a time and written from the definition."""
    loss, count = 0.0, 0
    for user, rows in demo_rows(model.backbone, out / "again")[1].items():
        for row in rows:
            batch = collate([row], model.backbone.pad_id)
            with torch.no_grad():
                logits = model.answer_logits(batch, rows_of(torch.tensor([numbers[user]])))
            likely = logits.float().log_softmax(-1)[0]
            loss -= sum(float(likely[at, token]) for at, token in enumerate(batch.labels[0].tolist()))
            count += batch.labels.shape[1]
    return loss / count


def test_the_library_serves_what_the_recipes_trained(
    finished: tuple[Path, dict[str, Told]], backbone_folder: Path
) -> None:
    out, told = finished
    model, e, numbers = group_model(out, backbone_folder)
    loss = held_out(model, out, lambda who: RowContext("groups", embedding=e[who]), numbers)
    assert told["stage2_groups"].held_out[-1] == pytest.approx(loss, abs=2e-3)

    config = UsersConfig(router="residual")
    model.add_lora_router(config)
    bank = AdapterBank(model.layout(config.rank), len(numbers), alpha=config.alpha, trainable=False)
    bank.values.copy_(load_tensors(out / "users.safetensors")[0]["values"])
    model.use_bank(bank)
    loss = held_out(model, out, lambda who: RowContext("fit", embedding=e[who], slots=who), numbers)
    assert told["stage3a_users"].held_out[-1] == pytest.approx(loss, abs=2e-3)

    trained, _ = load_tensors(out / "router.safetensors")
    for name, parameter in model.router_parameters().items():
        parameter.data.copy_(trained[name])
    loss = held_out(model, out, lambda who: RowContext("users", embedding=e[who], slots=who), numbers)
    assert told["stage3b_router"].held_out[-1] == pytest.approx(loss, abs=2e-3)


def first_batch(backbone: Backbone, folder: Path) -> Batch:
    """The first batch of stage 2's recipe."""
    everything = [row for own in demo_rows(backbone, folder)[0].values() for row in own]
    random.Random(0).shuffle(everything)
    return collate(everything[:64], backbone.pad_id)


def test_stage_2_loses_what_the_library_s_stage_loses(
    finished: tuple[Path, dict[str, Told]], run: Run, backbone_folder: Path, tmp_path: Path
) -> None:
    """With rates of zero the saved weights are those of step 1; experts and embeddings are made to matter at once."""
    (tmp_path / "population").symlink_to(finished[0] / "population")
    still = {"EPOCHS": 1, "RATE": 0.0, "EMBEDDING_RATE": 0.0}
    told = run("stage2_groups", tmp_path, **still, SPREAD=1.0, Experts=shaken_experts)
    model, e, numbers = group_model(tmp_path, backbone_folder)
    config = GroupsConfig(dropout=0.0, constraint=ConstraintConfig(weight=1.0))
    stage = GroupsStage(model, config, list(numbers), 0, Accelerator(cpu=True))
    stage.embeddings = e
    with torch.no_grad():
        loss = stage.loss(first_batch(model.backbone, tmp_path / "again"), progress=1.0)
    assert loss.penalty is not None
    assert f"step 1/2: loss {float(loss.total / loss.tokens):.4f}, cosine {float(loss.penalty):.4f}" in told.text


def shaken_experts(*sizes: int, **settings: Any) -> Experts:
    experts = Experts(*sizes, **settings)
    torch.nn.init.normal_(experts.up, std=0.3)
    return experts


def test_stage_3a_trains_everybody_as_if_alone(
    finished: tuple[Path, dict[str, Told]], run: Run, tmp_path: Path
) -> None:
    """If one user's history changes, no other user's LoRA changes, to the bit."""
    (tmp_path / "population").symlink_to(finished[0] / "population")
    (tmp_path / "groups.safetensors").symlink_to(finished[0] / "groups.safetensors")
    original = load_recipe("demo_rows").demo_rows

    def changed(*arguments: Any) -> Any:
        history, queries = original(*arguments)
        first = next(iter(history))
        history[first] = [EncodedExample(row.user, row.ids[::-1], row.start) for row in history[first]]
        return history, queries

    found = []
    for rows in (original, changed):
        run("stage3a_users", tmp_path, EPOCHS=1, demo_rows=rows)
        found.append(load_tensors(tmp_path / "users.safetensors")[0]["values"])
    assert not torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1:], found[1][1:])


@pytest.mark.slow
def test_the_recipes_run_in_sequence_as_programs(tmp_path: Path) -> None:
    environment = {**os.environ, "USERS": "10", "EPOCHS": "3"}
    told = {}
    for name in SEQUENCE:
        command = [sys.executable, str(FOLDER / f"{name}.py")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        told[name] = Told(done.stdout)
    for name in SEQUENCE[:-1]:
        assert told[name].losses[-1] < told[name].losses[0], name
    held_out = [told[name].held_out[-1] for name in SEQUENCE]
    assert held_out[0] < told["stage1_population"].held_out[0] - 1
    assert held_out[3] < held_out[0]
