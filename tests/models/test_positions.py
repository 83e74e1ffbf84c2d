"""A table of positions that is shorter than a run's rows is one line at load; rows as long as it are answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig, OPTConfig

from proper.config import Config, make_config
from proper.errors import ConfigError, InputError
from proper.inference.generate import respond
from proper.inference.model import PersonalizedModel
from proper.inference.sampling import Sampling
from proper.models.backbone import Backbone, configured_backbone, load_tokenizer
from proper.models.personal import ProperModel

ENDS: dict[str, Any] = {"vocab_size": 8192, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE: dict[str, Any] = ENDS | {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}
HIDDEN: dict[str, Any] = ENDS | {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
KINDS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(**WIDE),
    "gptj": lambda: GPTJConfig(**WIDE, rotary_dim=8),
    "opt": lambda: OPTConfig(**HIDDEN, ffn_dim=48, word_embed_proj_dim=32),
}


def load(folder: Path, config: Any, max_length: int, max_new_tokens: int = 4) -> tuple[Backbone, Config]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer("proper-nano").save_pretrained(folder)
    made = make_config(
        {
            "data": {"path": "x.jsonl", "prompt": "{input}", "target": "{output}"},
            "task": {"kind": "generation", "max_new_tokens": max_new_tokens},
            "backbone": str(folder),
            "compute": {"dtype": "fp32", "device": "cpu", "max_length": max_length},
        }
    )
    return configured_backbone(made), made


@pytest.mark.parametrize(
    ("length", "new", "lower"), [(25, 4, "it"), (20, 15, "task.max_new_tokens")], ids=["rows", "answers"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_longer_rows_than_the_table_are_refused(tmp_path: Path, kind: str, length: int, new: int, lower: str) -> None:
    said = rf"^compute\.max_length: rows may have 25 tokens, but the backbone has 24 positions; lower {lower}$"
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, KINDS[kind](), length, new)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_as_long_as_the_table_are_run(tmp_path: Path, kind: str) -> None:
    backbone, _ = load(tmp_path, KINDS[kind](), 24)
    assert backbone.positions == 24
    ids = torch.arange(5, 29)[None]
    assert backbone.model(input_ids=ids).logits.shape[1] == 24


def test_a_formula_has_no_end(tmp_path: Path) -> None:
    backbone, _ = load(tmp_path, LlamaConfig(**HIDDEN, intermediate_size=48), 100)
    assert backbone.positions is None
    assert backbone.model(input_ids=torch.arange(5, 65)[None]).logits.shape[1] == 60


def test_a_longer_answer_than_the_table_has_room_for_is_refused(tmp_path: Path) -> None:
    """What a call asks for by itself (`generate --max-new-tokens`) is not known at load."""
    backbone, config = load(tmp_path, KINDS["gpt2"](), 24)
    model = PersonalizedModel(ProperModel(backbone), backbone.encoder(24), config, None, "base")
    assert len(respond(model, ["Hello there"], [None], Sampling(8))) == 1
    with pytest.raises(InputError, match="may have 24 tokens together"):
        respond(model, ["Hello there"], [None], Sampling(48))


def test_an_answer_beyond_the_context_is_refused_at_load(tmp_path: Path) -> None:
    """The rows may be longer than the context: that is the config's choice."""
    kind = LlamaConfig(**HIDDEN, intermediate_size=48)
    load(tmp_path, kind, 100, 50)
    load(tmp_path, kind, 24, 24)
    said = r"^task\.max_new_tokens: an answer of 1000000 tokens does not fit into the backbone's context of 24$"
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, kind, 100, 10**6)
