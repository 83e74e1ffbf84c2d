"""Tiny random backbones of the common families, saved as folders, and personal layers filled with random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from proper.config import Config, GroupsConfig, UsersConfig, make_config
from proper.data.batching import Batch, collate
from proper.data.demo import DemoSettings, demo_config, write_demo
from proper.data.encoder import EncodedExample
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import RowContext
from proper.models.backbone import Backbone, load_backbone, load_tokenizer
from proper.models.personal import ProperModel

CPU = torch.device("cpu")
USERS = 4
RANK = 3


@dataclass(frozen=True)
class Family:
    """A kind of backbone: transformers' config class, its settings, and the adapted modules of one layer."""

    name: str
    config: str
    settings: dict[str, Any]
    ffn: tuple[str, ...]
    attention: tuple[str, ...]

    def make(self, vocabulary: int) -> PreTrainedConfig:
        kind: type[PreTrainedConfig] = getattr(transformers, self.config)
        # The spread is wide, so that a random model has opinions. Tokens are proper-nano's.
        common = {"vocab_size": vocabulary, "initializer_range": 0.15}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return kind(**common, **tokens, **self.settings)


_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
_WIDE = _SHAPE | {"intermediate_size": 48}
_GROUPED = _WIDE | {"num_key_value_heads": 2}
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKVO = (*_SPLIT, "self_attn.o_proj")
# A window shorter than the prompts below, so that a cache that drops old tokens is met.
_WINDOW = {"sliding_window": 6}

FAMILIES = (
    Family("llama", "LlamaConfig", _GROUPED, _GATED, _QKVO),
    Family("mistral", "MistralConfig", _GROUPED | _WINDOW | {"head_dim": 8}, _GATED, _QKVO),
    Family("qwen2", "Qwen2Config", _GROUPED, _GATED, _QKVO),
    Family("qwen3", "Qwen3Config", _GROUPED | {"head_dim": 8}, _GATED, _QKVO),
    Family("gemma", "GemmaConfig", _GROUPED | {"head_dim": 8}, _GATED, _QKVO),
    Family("gemma2", "Gemma2Config", _GROUPED | _WINDOW | {"head_dim": 8}, _GATED, _QKVO),
    Family("gemma3", "Gemma3TextConfig", _GROUPED | _WINDOW | {"head_dim": 8}, _GATED, _QKVO),
    Family("phi", "PhiConfig", _WIDE, ("mlp.fc1", "mlp.fc2"), (*_SPLIT, "self_attn.dense")),
    Family(
        "phi3",
        "Phi3Config",
        _GROUPED | _WINDOW,
        ("mlp.gate_up_proj", "mlp.down_proj"),
        ("self_attn.qkv_proj", "self_attn.o_proj"),
    ),
    Family(
        "gpt_neox",
        "GPTNeoXConfig",
        _WIDE,
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ("attention.query_key_value", "attention.dense"),
    ),
    Family(
        "opt",
        "OPTConfig",
        _SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.15},
        ("fc1", "fc2"),
        (*_SPLIT, "self_attn.out_proj"),
    ),
    Family(
        "gpt2",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        ("mlp.c_fc", "mlp.c_proj"),
        ("attn.c_attn", "attn.c_proj"),
    ),
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer("proper-nano")


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


@pytest.fixture(scope="session")
def save(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    """Save a random model of a family with proper-nano's tokenizer, once a session."""
    made: dict[str, Path] = {}

    def save_family(family: Family) -> Path:
        if family.name not in made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(family.make(len(tokenizer)))
            folder = tmp_path_factory.mktemp("backbones") / family.name
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[family.name] = folder
        return made[family.name]

    return save_family


@pytest.fixture(scope="session")
def folder(family: Family, save: Callable[[Family], Path]) -> Path:
    return save(family)


@pytest.fixture(scope="session")
def named(save: Callable[[Family], Path]) -> Callable[[str], Path]:
    """Save a random model of the family with this name."""
    return lambda name: save(next(family for family in FAMILIES if family.name == name))


@pytest.fixture(scope="session")
def llama(save: Callable[[Family], Path]) -> Path:
    return save(FAMILIES[0])


@pytest.fixture
def backbone(folder: Path) -> Backbone:
    return load_backbone(str(folder), torch.float32, CPU)


@dataclass(frozen=True)
class Personal:
    """A backbone with experts, routers and a bank of USERS adapters.

    The last slot is empty on purpose: its user has an embedding only.
    """

    model: ProperModel
    bank: AdapterBank
    embeddings: torch.Tensor

    @property
    def backbone(self) -> Backbone:
        return self.model.backbone

    def fill(self, seed: int = 0) -> None:
        """Fill everything that is zero at the start, so that no user's answer is the backbone's or a neighbour's."""
        generator = torch.Generator().manual_seed(seed)
        matrices = {**self.model.group_parameters(), **self.model.router_parameters()}
        for parameter in matrices.values():
            spread = parameter.shape[1] ** -0.5
            parameter.data.copy_(spread * torch.randn(parameter.shape, generator=generator))
        self.bank.values.copy_(0.3 * torch.randn(self.bank.values.shape, generator=generator))
        self.embeddings.copy_(torch.randn(self.embeddings.shape, generator=generator))

    def rows(self, users: list[int], **more: Any) -> RowContext:
        slots = torch.tensor([user if user < USERS - 1 else -1 for user in users])
        return RowContext("users", embedding=self.embeddings[users], slots=slots, **more)


Personalize = Callable[..., Personal]


@pytest.fixture
def personalize() -> Personalize:
    """Put the layers of all three stages into a backbone."""

    def put(backbone: Backbone, target_modules: Any = "all", experts: int = 3) -> Personal:
        model = ProperModel(backbone)
        model.add_experts(
            GroupsConfig(experts=experts, rank=2, alpha=3, user_embedding=8, target_modules=target_modules), seed=0
        )
        model.add_lora_router(UsersConfig())
        bank = AdapterBank(model.layout(RANK), USERS, alpha=4.0, trainable=True)
        model.use_bank(bank)
        return Personal(model, bank, torch.zeros(USERS, model.embedding_size))

    return put


@pytest.fixture
def personal(backbone: Backbone, personalize: Personalize) -> Personal:
    return personalize(backbone)


TEXTS = (
    ("Which word fits the headline best: storms close the coast road?", "weather"),
    ("A new bakery opens.", "food and drink"),
    ("The council voted on Tuesday to keep the library open late, to nobody's surprise, again.", "politics"),
    ("Goal!", "sports"),
)


@pytest.fixture(scope="session")
def encoded(tokenizer: Any) -> list[EncodedExample]:
    """Rows of different lengths, each of a user of its own."""

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    sides = [(tokens(prompt), tokens(" " + target)) for prompt, target in TEXTS]
    return [EncodedExample(f"user{i}", (1, *p, *t, 2), len(p) + 1) for i, (p, t) in enumerate(sides)]


@pytest.fixture(scope="session")
def batch(encoded: list[EncodedExample]) -> Batch:
    return collate(encoded, pad=0)


@dataclass(frozen=True)
class TinyJob:
    """Demo data of a few users, and configs of short runs on it."""

    data: Path

    def config(self, backbone: Path | str, **sections: Any) -> Config:
        """Two steps of each stage, in fp32, without dropout, on the CPU."""
        short = {"max_tokens": 1500, "epochs": 1, "dropout": 0.0, "batch_size": 8}
        settings = DemoSettings(users=6, groups=2, items=(6, 8))
        raw: dict[str, Any] = {
            **demo_config(self.data, settings),
            "backbone": str(backbone),
            "compute": {"dtype": "fp32", "device": "cpu", "max_length": 96, "checkpoint_seconds": 3600},
            "population": dict(short),
            "groups": short | {"experts": 3, "rank": 2, "user_embedding": 8},
            "users": {"epochs": 1, "rank": 2, "tiers": {"select": False}},
        }
        raw["split"] |= {"min_history": 2}
        for name, section in sections.items():
            raw[name] = raw.get(name, {}) | section
        return make_config(raw)


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    folder = tmp_path_factory.mktemp("demo")
    return TinyJob(write_demo(folder, DemoSettings(users=6, groups=2, items=(6, 8))))
