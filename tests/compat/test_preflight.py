"""A backbone that a run cannot train, save and ask is refused in one line before stage 1; the others are left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from proper import pipeline
from proper.cli.app import main
from proper.config import PopulationConfig
from proper.errors import ConfigError
from proper.models.backbone import configured_backbone, digest, load_backbone, load_tokenizer
from proper.models.targets import find_targets
from proper.models.tokenizer import configured_encoder
from proper.run_folder import RunFolder
from proper.training.population import wrap
from proper.training.preflight import check_once, preflight
from tests import tokenizer_kinds

CPU = torch.device("cpu")
Make = Callable[..., Path]

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.15}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS |= {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 16, "head_dim": 8}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
VISION |= {"image_size": 28, "patch_size": 14}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
HYBRID = ["linear_attention", "full_attention"]

FUSED = {
    "MixtralConfig": EXPERTS,
    "OlmoeConfig": EXPERTS,
    "GraniteMoeConfig": EXPERTS,
    "GptOssConfig": EXPERTS | {"layer_types": ["sliding_attention", "full_attention"]},
    "PhimoeConfig": EXPERTS,
    "Qwen3MoeConfig": EXPERTS,
    "JetMoeConfig": EXPERTS | {"kv_channels": 8},
}
SHARED = {
    "Qwen2MoeConfig": (EXPERTS, "mlp.shared_expert."),
    "GraniteMoeSharedConfig": (EXPERTS | {"shared_intermediate_size": 16}, "shared_mlp."),
    "Glm4MoeConfig": (
        EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
        "mlp.shared_experts.",
    ),
}
STATES = {
    "Lfm2Config": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "FalconH1Config": MAMBA | {"mamba_chunk_size": 8},
    "Qwen3NextConfig": EXPERTS | LINEAR | {"layer_types": HYBRID},
    "MambaConfig": {"state_size": 8},
    "RwkvConfig": {"attention_hidden_size": 32},
    "RecurrentGemmaConfig": {"lru_width": 32},
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Save a tiny random backbone of any family, by default with proper-nano's tokenizer."""

    def save(kind: str, tokenizer: Any = None, rows: int | None = None, **settings: Any) -> Path:
        tokenizer = tokenizer or load_tokenizer("proper-nano")
        common = {**SHAPE, **ENDS, "vocab_size": rows or len(tokenizer)}
        folder = tmp_path_factory.mktemp(kind.removesuffix("Config").lower())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = getattr(transformers, kind)(**{**common, **settings})
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def gemma3(make: Make) -> Path:
    """Gemma 3 from 4B up: a vision tower beside the language model."""
    rows = len(load_tokenizer("proper-nano")) + 8
    images = {"image_token_index": rows - 3, "boi_token_index": rows - 2, "eoi_token_index": rows - 1}
    text = {**SHAPE, **ENDS, "vocab_size": rows, "head_dim": 8, "sliding_window": 16}
    return make("Gemma3Config", text_config=text, vision_config=VISION, mm_tokens_per_image=1, **images)


def passes(job: Any, folder: Path, targets: str = "ffn", **sections: Any) -> Any:
    """Try a backbone, see that nothing of it has changed, and return it."""
    config = job.config(folder, groups={"target_modules": targets}, **sections)
    backbone = configured_backbone(config)
    before = [name for name, _ in backbone.model.named_modules()], backbone.digest, torch.random.get_rng_state()
    preflight(backbone, config)
    assert [name for name, _ in backbone.model.named_modules()] == before[0] and digest(backbone.model) == before[1]
    assert torch.equal(torch.random.get_rng_state(), before[2])
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())
    return backbone


def refused(job: Any, folder: Path, **sections: Any) -> str:
    config = job.config(folder, **sections)
    with pytest.raises(ConfigError) as caught:
        preflight(configured_backbone(config), config)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_every_family_passes(family: Any, folder: Path, job: Any) -> None:
    passes(job, folder)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_embedded_backbone_passes(job: Any, dtype: str) -> None:
    """`proper run` leaves the whole of it to this test."""
    passes(job, Path("proper-nano"), compute={"dtype": dtype})


def test_gradient_checkpointing_is_tried_too(llama: Path, job: Any) -> None:
    passes(job, llama, population={"gradient_checkpointing": True})


@pytest.mark.parametrize("kind", FUSED)
def test_attention_is_adapted_where_experts_are_fused(make: Make, job: Any, kind: str) -> None:
    folder = make(kind, **FUSED[kind])
    message = refused(job, folder)
    assert message.startswith("groups.target_modules: nothing in ")
    assert " matches 'ffn'; its experts are fused parameters" in message
    assert "there are: k_proj, o_proj, q_proj, v_proj" in message or "there are: kv_proj" in message
    backbone = passes(job, folder, "auto")
    assert find_targets(backbone.model, "all") == find_targets(backbone.model, "attention")
    assert not any("router" in name or "gate" in name for name in find_targets(backbone.model, "all"))


@pytest.mark.parametrize("kind", SHARED)
def test_shared_experts_are_adapted_and_their_gates_are_not(make: Make, job: Any, kind: str) -> None:
    settings, part = SHARED[kind]
    backbone = passes(job, make(kind, **settings), "all", population={"dropout": 0.05})
    names = list(find_targets(backbone.model, "ffn"))
    assert names and all(part in name for name in names)
    wrapped = wrap(backbone, PopulationConfig(), seed=0)
    adapted = {
        name.removeprefix("base_model.model.") for name, m in wrapped.named_modules() if isinstance(m, LoraLayer)
    }
    assert adapted == set(find_targets(backbone.model, "all")), "PEFT takes shared experts for fused ones"


@pytest.mark.parametrize("kind", STATES)
def test_layers_with_a_state_of_their_own_are_refused(make: Make, job: Any, kind: str) -> None:
    message = refused(job, make(kind, **STATES[kind]))
    assert "is not supported: its " in message and "instead of keys and values" in message


def test_rows_that_take_positions_from_their_neighbours_are_refused(make: Make, job: Any) -> None:
    sides = {f"{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    message = refused(job, make("BartConfig", d_model=32, decoder_ffn_dim=48, is_encoder_decoder=False, **sides))
    assert message.endswith(
        "cached decoding fails: a row's answer depends on the length of the other rows of its batch"
    )


def test_a_family_without_a_cache_is_refused(make: Make, job: Any) -> None:
    message = refused(job, make("OpenAIGPTConfig"))
    assert message.endswith("(OpenAIGPTLMHeadModel) has no key-value cache, which answers need")


def test_only_the_text_model_is_adapted(make: Make, job: Any) -> None:
    backbone = passes(job, gemma3(make), "all")
    for wanted in ("ffn", "attention", "all", ["fc1", "q_proj"]):
        names = list(find_targets(backbone.model, wanted))
        assert names and all(name.startswith("model.language_model.") for name in names)
    with pytest.raises(ConfigError, match="nothing in Gemma3ForConditionalGeneration matches"):
        find_targets(backbone.model, ["fc1"])


def test_what_fails_is_named(named: Callable[[str], Path], job: Any) -> None:
    """A layer that does not do what its kind does, as Phi-MoE's router, and one that forgets what is cached."""
    config = job.config(named("llama"))
    backbone = configured_backbone(config)
    attention = backbone.model.model.layers[1].self_attn
    whole = attention.forward
    attention.forward = lambda *args, past_key_values=None, **more: whole(*args, past_key_values=None, **more)
    with pytest.raises(ConfigError, match=r"\(LlamaForCausalLM\) is not supported: cached decoding fails: "):
        preflight(backbone, config)
    backbone = configured_backbone(config)
    projection = backbone.model.model.layers[0].mlp.up_proj
    projection.forward = lambda x: (x, x)
    with pytest.raises(ConfigError, match=r"is not supported: stage 1 \(forward, .*\) fails: \w+Error: "):
        preflight(backbone, config)


def test_it_is_done_once_for_a_run_folder(llama: Path, job: Any, tmp_path: Path) -> None:
    config = job.config(llama)
    backbone = configured_backbone(config)
    check_once(backbone, config, tmp_path)
    facts = json.loads((RunFolder(tmp_path).preflight).read_text())
    assert facts["backbone"] == backbone.digest
    backbone.model.model.layers[0].mlp.up_proj.forward = lambda x: (x, x)
    check_once(backbone, config, tmp_path)
    backbone.digest = "another"
    with pytest.raises(ConfigError, match="is not supported"):
        check_once(backbone, config, tmp_path)
    assert json.loads((RunFolder(tmp_path).preflight).read_text()) == facts


def test_a_run_ends_before_stage_1(make: Make, job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make("Lfm2Config", **STATES["Lfm2Config"])
    path = tmp_path / "notes.yaml"
    path.write_text(json.dumps(job.config(folder).model_dump()))
    for arguments in (["run", str(path), "--out", str(tmp_path / "run")], ["check", str(path), "--backbone"]):
        assert main(arguments) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"proper: backbone: '{folder}' (Lfm2ForCausalLM) is not supported: its conv layers keep")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"groups\.target_modules: nothing in .* matches \['nothing'\]; there are: "):
        pipeline.run(job.config("proper-nano", groups={"target_modules": ["nothing"]}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_check_says_what_is_adapted(llama: Path, job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.yaml"
    path.write_text(json.dumps(job.config(llama).model_dump() | {"data": {"path": "nowhere.jsonl"}}))
    assert main(["check", str(path), "--backbone"]) == 0
    assert capsys.readouterr().out == (
        f"backbone {llama} (LlamaForCausalLM) is supported; adapted are population: down_proj, gate_proj, k_proj, "
        "o_proj, q_proj, up_proj, v_proj; groups and users: down_proj, gate_proj, up_proj\n"
    )


def test_a_padding_token_without_an_embedding(make: Make, job: Any) -> None:
    tokenizer = load_tokenizer("proper-nano")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    backbone = passes(job, make("LlamaConfig", tokenizer, rows))
    assert backbone.tokenizer.pad_token_id == rows and backbone.pad_id == 2


def test_a_tokenizer_without_an_end_token_ends_with_its_separator(make: Make, job: Any) -> None:
    """uer/gpt2-chinese: BERT's tokenizer, and a config whose end is GPT-2's, far beyond the vocabulary."""
    tokenizer = tokenizer_kinds.word_piece()
    folder = make("GPT2Config", tokenizer, n_embd=32, n_layer=2, n_head=4, eos_token_id=50256, bos_token_id=50256)
    backbone = passes(job, folder)
    for encoder in (backbone.encoder(64), configured_encoder(job.config(folder))):
        assert encoder.end == tokenizer.sep_token_id and encoder.ends == {encoder.end}
        assert encoder.start == (tokenizer.cls_token_id,) and encoder.rows == len(tokenizer)


def test_ends_that_the_configs_name(make: Make, job: Any) -> None:
    tokenizer = tokenizer_kinds.chatml()
    turn, word = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("s")
    folder = make("LlamaConfig", tokenizer, eos_token_id=[2, turn, word, 10**6])
    encoders = [load_backbone(str(folder), torch.float32, CPU).encoder(64), configured_encoder(job.config(folder))]
    assert [(encoder.end, encoder.ends) for encoder in encoders] == [(2, {2, turn})] * 2
    tokenizer.eos_token = None
    encoder = load_backbone(str(make("LlamaConfig", tokenizer, eos_token_id=turn)), torch.float32, CPU).encoder(64)
    assert encoder.end == turn and encoder.answer("x")[-1] == turn


def test_no_end_at_all_is_refused(make: Make, job: Any) -> None:
    tokenizer = tokenizer_kinds.word_level()
    tokenizer.eos_token = None
    folder = make("LlamaConfig", tokenizer, eos_token_id=None)
    for load in (configured_backbone, configured_encoder):
        with pytest.raises(ConfigError, match="names an end token among the model's .* embeddings"):
            load(job.config(folder))


@pytest.fixture
def remote(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A backbone folder with code of its own, which leaves a mark where it runs."""
    folder = tmp_path / "remote"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'RAN')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def test_code_beside_weights_runs_only_if_the_config_says_so(remote: Path, job: Any, tmp_path: Path) -> None:
    for load in (configured_encoder, configured_backbone):
        with pytest.raises(ConfigError, match="trust_remote_code: true in the config runs that code"):
            load(job.config(remote))
    assert not (tmp_path / "RAN").exists()
    trusting = job.config(remote).model_copy(update={"trust_remote_code": True})
    assert type(configured_backbone(trusting).model).__name__ == "Model" and (tmp_path / "RAN").exists()
