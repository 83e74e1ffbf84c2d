"""A backbone that cannot be used is one line that says why, never a model with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from proper.cli.app import main
from proper.config import PopulationConfig
from proper.errors import ConfigError
from proper.models.backbone import load_backbone, load_tokenizer, pick_device
from proper.models.targets import find_targets
from proper.training.population import wrap

CPU = torch.device("cpu")


def refused(action: Callable[[], Any]) -> str:
    """Run what must fail with a ConfigError of one line; return the line."""
    with pytest.raises(ConfigError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and message == message.strip() and len(message) < 400
    return message


def load(folder: Path | str) -> Callable[[], Any]:
    return lambda: load_backbone(str(folder), torch.float32, CPU)


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A whole backbone folder, to be spoiled."""
    shutil.copytree(llama, tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("load_it", [load_tokenizer, lambda name: load(name)()])
def test_missing_folder(tmp_path: Path, load_it: Callable[[str], Any]) -> None:
    for name in (str(tmp_path / "nobody"), "./nobody", "../models/nobody", "models/tiny/nobody", ""):
        assert refused(lambda name=name: load_it(name)) == f"backbone: the folder {name!r} does not exist"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("?")
    assert refused(load(tmp_path / "model")) == f"backbone: the folder '{tmp_path}/model' does not exist"


def test_unknown_model_id() -> None:
    message = refused(load("nobody/nothing"))
    assert message.startswith("backbone: 'nobody/nothing', which is no folder here, cannot be loaded: ")


def test_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert refused(load(copy)) == (
        f"backbone: folder '{copy}' cannot be loaded: Error no file named model.safetensors, or pytorch_model.bin, "
        f"found in directory {copy}."
    )


def test_empty_folder(tmp_path: Path) -> None:
    assert refused(load(tmp_path)) == (
        f"backbone: folder '{tmp_path}' cannot be loaded: Unrecognized model in {tmp_path}. Should have a `model_type` "
        "key in its config.json."
    )


def test_folder_without_tokenizer(copy: Path) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    for action in (load(copy), lambda: load_tokenizer(str(copy))):
        assert refused(action).startswith(f"backbone: folder '{copy}' has no tokenizer: ")


def test_damaged_weights(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert refused(load(copy)).startswith(f"backbone: folder '{copy}' cannot be loaded: Error while deserializing")


def test_damaged_config(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert refused(load(copy)).startswith(f"backbone: folder '{copy}' cannot be loaded: ")


def test_weights_for_fewer_layers_than_the_config_says(copy: Path) -> None:
    change_config(copy, num_hidden_layers=3)
    assert refused(load(copy)) == (
        f"backbone: folder '{copy}': 9 weights are missing or misshapen, first model.layers.2.input_layernorm.weight"
    )


def test_weights_of_another_shape(copy: Path) -> None:
    change_config(copy, intermediate_size=52)
    assert refused(load(copy)) == (
        f"backbone: folder '{copy}': 6 weights are missing or misshapen, first model.layers.0.mlp.down_proj.weight"
    )


def test_a_model_that_is_not_causal(copy: Path) -> None:
    T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=8, num_layers=1, d_ff=8, num_heads=1)).save_pretrained(
        copy
    )
    assert refused(load(copy)).startswith(
        f"backbone: folder '{copy}' cannot be loaded: Unrecognized configuration class"
    )


@pytest.mark.parametrize("name", ["gpu", "xla", "hpu", "cpu:one", ""])
def test_unknown_device(name: str) -> None:
    assert refused(lambda: pick_device(name)).startswith(f"compute.device: {name!r} is not available: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    for name in ("cuda", "cuda:1"):
        assert refused(lambda name=name: pick_device(name)).startswith(f"compute.device: {name!r} is not available: ")


def test_a_device_that_holds_nothing() -> None:
    assert refused(lambda: pick_device("meta")) == "compute.device: 'meta' has no values"


def test_target_modules_that_match_nothing(llama: Path) -> None:
    backbone = load(llama)()
    expected = (
        "target_modules: nothing in LlamaForCausalLM matches ['c_fc', 'fc']; there are: down_proj, gate_proj, k_proj, "
        "o_proj, q_proj, up_proj, v_proj"
    )
    assert refused(lambda: find_targets(backbone.model, ["c_fc", "fc"])) == expected
    assert refused(lambda: wrap(backbone, PopulationConfig(target_modules=["c_fc", "fc"]), 0)) == expected


def test_the_command_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], job: Any) -> None:
    config = tmp_path / "notes.yaml"
    config.write_text(json.dumps({"data": {"path": str(job.data)}, "backbone": "models/tiny/nobody"}))
    assert main(["run", str(config), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "proper: backbone: the folder 'models/tiny/nobody' does not exist\n"
