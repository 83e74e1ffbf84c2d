"""Messages become prompts as the run's training data were written: never by the tokenizer's chat template so far."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from transformers import AutoTokenizer

from proper.config import DataConfig
from proper.errors import ConfigError
from proper.models.backbone import backbone_location
from proper.serving.answers import chat_prompt

if TYPE_CHECKING:
    Serve = Any  # tests/serving/conftest.py


@dataclass(frozen=True)
class Said:
    role: str
    text: str


def test_one_message_is_the_prompt_and_several_are_written_out() -> None:
    assert chat_prompt([Said("user", "Hello")]) == "Hello"
    turns = [Said("system", "Be brief."), Said("user", "Hello"), Said("assistant", "Hi."), Said("user", "Who?")]
    assert chat_prompt(turns) == "System: Be brief.\nUser: Hello\nAssistant: Hi.\nUser: Who?\nAssistant:"


def test_both_routes_ask_the_same_where_the_tokenizer_has_a_template(
    serve: Serve, long_run: Path, tmp_path: Path
) -> None:
    raw = yaml.safe_load((long_run / "config.yaml").read_text(encoding="utf-8"))
    backbone = shutil.copytree(backbone_location(raw["backbone"]), tmp_path / "backbone")
    tokenizer: Any = AutoTokenizer.from_pretrained(backbone)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    tokenizer.save_pretrained(backbone)
    folder = shutil.copytree(long_run, tmp_path / "tiny")
    (folder / "config.yaml").write_text(yaml.safe_dump({**raw, "backbone": str(backbone)}), encoding="utf-8")
    asked = {"model": "tiny", "user": "u1", "max_tokens": 8}
    with serve(folder).client() as client:
        plain = client.post("/v1/completions", json={**asked, "prompt": "Well?"}).json()
        messages = [{"role": "user", "content": "Well?"}]
        chat = client.post("/v1/chat/completions", json={**asked, "messages": messages}).json()
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert chat["usage"] == plain["usage"]


def test_the_choice_is_a_setting_of_the_run() -> None:
    assert DataConfig(path="x").model_dump()["chat"] == "off"
    assert DataConfig(**yaml.safe_load("{path: x, chat: off}")).chat == "off"
    with pytest.raises((ValueError, ConfigError)):
        DataConfig(path="x", chat="on")  # type: ignore[arg-type]
