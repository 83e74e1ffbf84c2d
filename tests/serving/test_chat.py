"""Both HTTP routes write prompts as the run's training did: with the backbone's chat template, or without."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from transformers import AutoTokenizer

import proper
from proper.config import DataConfig
from proper.data.chat import TextMessage
from proper.data.conversations import join_turns
from proper.errors import ConfigError
from proper.inference.generate import generate
from proper.models.backbone import backbone_location
from proper.serving.schemas.requests import ChatRequest

if TYPE_CHECKING:
    from tests.serving.conftest import Serve


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


@pytest.mark.parametrize("chat", ["on", "off", None])
def test_both_routes_ask_as_the_run_was_trained(serve: Serve, long_run: Path, tmp_path: Path, chat: str | None) -> None:
    raw = yaml.safe_load((long_run / "config.yaml").read_text(encoding="utf-8"))
    backbone = shutil.copytree(backbone_location(raw["backbone"]), tmp_path / "backbone")
    tokenizer: Any = AutoTokenizer.from_pretrained(backbone)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(backbone)
    folder = shutil.copytree(long_run, tmp_path / "tiny")
    data = {key: value for key, value in raw["data"].items() if key != "chat"} | ({"chat": chat} if chat else {})
    config = {**raw, "backbone": str(backbone), "data": data, "compute": {**raw["compute"], "max_length": 128}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    asked = {"model": "tiny", "user": "u1", "max_tokens": 8}
    with serve(folder).client() as client:
        plain = client.post("/v1/completions", json={**asked, "prompt": "Well?"}).json()
        messages = [{"role": "user", "content": "Well?"}]
        reply = client.post("/v1/chat/completions", json={**asked, "messages": messages}).json()
        longer = [{"role": "system", "content": "Be brief."}, *messages]
        two = client.post("/v1/chat/completions", json={**asked, "messages": longer}).json()
    assert reply["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    # A row of the same messages, as training and evaluation read it, has the same answer.
    model = proper.load(folder)
    texts = [join_turns([TextMessage(each["role"], each["content"]) for each in talk]) for talk in (messages, longer)]
    answers = generate(model.personalized, texts, ["u1", "u1"], max_new_tokens=8)
    assert [one["choices"][0]["message"]["content"] for one in (reply, two)] == answers
    assert reply["usage"] == plain["usage"]
    # A run that does not say whether it uses the template was trained without it.
    text = "<|user|>Well?<|assistant|>" if chat == "on" else "Well?"
    start = len(tokenizer("").input_ids) if chat != "on" else 0
    expected = [start + len(tokenizer(text, add_special_tokens=False).input_ids)]
    text = (
        "<|system|>Be brief.<|user|>Well?<|assistant|>"
        if chat == "on"
        else "System: Be brief.\nUser: Well?\nAssistant:"
    )
    expected.append(start + len(tokenizer(text, add_special_tokens=False).input_ids))
    assert [one["usage"]["prompt_tokens"] for one in (reply, two)] == expected


def test_the_choice_is_a_setting_of_the_run() -> None:
    assert DataConfig(path="x").model_dump()["chat"] == "auto"
    for word in ("auto", "on", "off"):
        assert DataConfig(**yaml.safe_load(f"{{path: x, chat: {word}}}")).chat == word
    with pytest.raises((ValueError, ConfigError)):
        DataConfig(path="x", chat="always")  # type: ignore[arg-type]


def test_a_developers_message_is_the_systems() -> None:
    """Many chat templates leave out roles that they do not know."""
    sent = {"model": "tiny", "messages": [{"role": "developer", "content": "Be brief."}]}
    assert [one.role for one in ChatRequest.model_validate(sent).messages] == ["system"]
