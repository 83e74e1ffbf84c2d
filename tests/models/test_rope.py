"""RoPE that depends on the longest row: the same numbers alone and beside a longer row, on every path, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config, PhimoeConfig

from proper.config import make_config
from proper.data.batching import collate
from proper.data.encoder import EncodedExample, Encoder
from proper.errors import ConfigError
from proper.inference import load
from proper.inference.engine import Engine
from proper.inference.model import PersonalizedModel
from proper.inference.requests import EngineLimits, Event, Finished, Request, Token
from proper.inference.sampling import Sampling
from proper.inference.score import score_labels
from proper.layers.batch_context import RowContext
from proper.models.backbone import configured_backbone, load_tokenizer
from proper.models.personal import ProperModel

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 8.0, 16.0, 32.0],
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
}
SHORT, LONGER = tuple(range(5, 15)), tuple(range(60, 100))
KINDS: dict[str, Callable[[], Any]] = {
    "phi3": lambda: Phi3Config(
        **SHAPE, max_position_embeddings=128, original_max_position_embeddings=16, rope_parameters=LONG
    ),
    "llama": lambda: LlamaConfig(**SHAPE, max_position_embeddings=16, rope_parameters=DYNAMIC),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE,
        head_dim=8,
        max_position_embeddings=16,
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


def written(folder: Path, config: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer("proper-nano").save_pretrained(folder)
    return folder


def settings(folder: Path, length: int = 64) -> dict[str, Any]:
    compute = {"dtype": "fp32", "max_length": length, "batch_size": 8, "device": "cpu"}
    task = {"max_new_tokens": 8}  # half of the shortest row
    return {"data": {"path": "nothing.jsonl"}, "backbone": str(folder), "task": task, "compute": compute}


@pytest.fixture(scope="module", params=sorted(KINDS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ProperModel]:
    folder = written(tmp_path_factory.mktemp(request.param), KINDS[request.param]())
    return folder, ProperModel(configured_backbone(make_config(settings(folder))))


class Heard:
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Token):
            self.tokens.append(event.id)
        assert not isinstance(event, Finished) or event.error is None


def answers(
    model: PersonalizedModel, *asked: tuple[tuple[int, ...], str | None], turns: bool = False, **limits: Any
) -> list[list[int]]:
    """Each one's eight tokens, from one engine: all at once, or one after the other."""
    engine, told = Engine(model, EngineLimits(4, 4, **limits), strict=True), []
    for prompt, user in asked:
        told.append(Heard())
        engine.submit(Request(prompt, user, sampling=Sampling(12)), told[-1])
        while turns and not engine.idle:
            engine.step()
    while not engine.idle:
        engine.step()
    reused = engine.stats().reused_tokens
    engine.close()
    assert bool(reused) == turns
    return [one.tokens for one in told]


def test_training_and_scoring_are_the_same_beside_a_longer_row(made: tuple[Path, ProperModel]) -> None:
    _, model = made
    rows = [EncodedExample("a", SHORT, 6), EncodedExample("b", LONGER, 36)]
    with torch.no_grad():
        one = model.answer_logits(collate(rows[:1], 0), RowContext())[0]
        both = model.answer_logits(collate(rows, 0), RowContext())[0, -4:]
    assert torch.allclose(one, both, atol=1e-5)
    labels = [(9, 10), (9, 11, 12)]
    alone, beside = (score_labels(model, prompts, labels, RowContext())[0] for prompts in ([SHORT], [SHORT, LONGER]))
    assert torch.allclose(alone, beside, atol=1e-5)


def test_answers_are_the_same_beside_a_longer_row(made: tuple[Path, ProperModel]) -> None:
    folder, model = made
    config = make_config(settings(folder))
    encoder = Encoder(model.backbone.tokenizer, 64)
    whole = PersonalizedModel(model, encoder, config, None, "base")
    # Twelve tokens take the short one past the length of pretraining while it is decoded.
    alone = answers(whole, (SHORT, None))[0]
    assert answers(whole, (SHORT, None), (LONGER, None))[0] == alone
    assert answers(whole, (LONGER, None), (SHORT, None), prefill=1)[1] == alone
    recomputed = []
    for at in range(12):
        ids = torch.tensor([[*SHORT, *alone[:at]]])
        with torch.no_grad():
            recomputed.append(int(model.backbone.model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
    assert recomputed[: len(alone)] == alone


def test_kept_prefixes_are_the_same_beside_a_longer_row(tiny_run: Path, tmp_path: Path) -> None:
    """The tiny run's adapters on a Llama of the same shape."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    raw = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    raw["backbone"] = str(written(tmp_path / "llama", KINDS["llama"]()))
    (run / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    model = load(run)
    longer = (*range(5, 25), 30, 31)
    fresh = [answers(model, (prompt, "u0"))[0] for prompt in (longer[:20], longer)]
    assert answers(model, (longer[:20], "u0"), (longer, "u0"), turns=True) == fresh
    assert answers(model, (longer, "u0"), (LONGER, "u1"))[0] == fresh[1]
    model.close()


@pytest.mark.parametrize(("length", "same"), [(16, True), (17, False)])
def test_the_longest_row_of_the_run_decides(tmp_path: Path, length: int, same: bool) -> None:
    """Up to the length of pretraining, the frequencies are those of pretraining; beyond, those of the longest row."""
    for kind, name in (("phi3", "inv_freq"), ("llama", "inv_freq"), ("gemma3", "full_attention_inv_freq")):
        folder = written(tmp_path / f"{kind}{length}", KINDS[kind]())
        held = getattr(configured_backbone(make_config(settings(folder, length))).model.model.rotary_emb, name)  # type: ignore
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        first = getattr(theirs.model.rotary_emb, name).clone()
        assert torch.equal(held, first) == same
        theirs(input_ids=torch.zeros(1, length, dtype=torch.long))
        torch.testing.assert_close(
            held, getattr(theirs.model.rotary_emb, name)
        )  # as transformers has it for such a row


def test_a_family_with_a_rule_of_its_own_is_refused(tmp_path: Path) -> None:
    rope = {**LONG, "short_mscale": 1.0, "long_mscale": 2.0}
    config = PhimoeConfig(**SHAPE, num_local_experts=4, max_position_embeddings=128, rope_parameters=rope)
    folder = written(tmp_path / "phimoe", config)
    with pytest.raises(ConfigError, match=r"RoPE \(longrope\) depends on the longest text of a batch"):
        configured_backbone(make_config(settings(folder)))


def test_a_rope_that_depends_on_nothing_stays(tmp_path: Path) -> None:
    for kind in ("linear", "yarn"):
        rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
        folder = written(tmp_path / kind, LlamaConfig(**SHAPE, max_position_embeddings=64, rope_parameters=rope))
        assert configured_backbone(make_config(settings(folder))).model.model.rotary_emb.rope_type == kind  # type: ignore
