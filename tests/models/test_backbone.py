"""Loading a backbone: folders, what is missing, and facts about what was loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from proper.errors import ConfigError
from proper.models.backbone import (
    Backbone,
    backbone_location,
    digest,
    load_backbone,
    load_tokenizer,
    pick_device,
    pick_dtype,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder(backbone: Callable[..., Backbone], tmp_path: Path, dtype: torch.dtype) -> None:
    tiny = backbone()
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)

    loaded = load_backbone(str(tmp_path), dtype, torch.device("cpu"))

    assert loaded.model.dtype == dtype and not loaded.model.training and not loaded.quantized
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.digest == tiny.digest) == (dtype == torch.float32)
    assert loaded.hidden_size == 32 and loaded.pad_id == 0 and loaded.device == torch.device("cpu")
    assert loaded.tokenizer("a sentence").input_ids == tiny.tokenizer("a sentence").input_ids


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="backbone: folder .* cannot be loaded") as error:
        load_backbone(str(tmp_path), torch.float32, torch.device("cpu"))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="backbone: .*'/no/such/place'") as error:
        load_backbone("/no/such/place", torch.float32, torch.device("cpu"))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="backbone: .*tokenizer") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_the_embedded_backbone_is_in_the_package() -> None:
    folder = Path(backbone_location("proper-nano"))
    assert (folder / "config.json").exists() and (folder / "model.safetensors").stat().st_size <= 32 * 2**20
    assert backbone_location("other/model") == "other/model"


def test_a_digest_sees_every_tensor(backbone: Callable[..., Backbone]) -> None:
    tiny = backbone()
    assert digest(tiny.model) == tiny.digest == backbone().digest
    for name, parameter in tiny.model.named_parameters():
        before = parameter.data.clone()
        parameter.data.view(-1)[0] += 1
        assert digest(tiny.model) != tiny.digest, name
        parameter.data.copy_(before)


@pytest.mark.parametrize(("pad", "end", "expected"), [(7, 2, 7), (None, 2, 2), (None, None, 0)])
def test_a_backbone_without_a_pad_token_pads_with_its_end(
    backbone: Callable[..., Backbone], pad: int | None, end: int | None, expected: int
) -> None:
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=end)
    assert replace(backbone(), tokenizer=tokenizer).pad_id == expected


def test_dtypes_and_devices() -> None:
    assert pick_dtype("auto") == pick_dtype("bf16") == torch.bfloat16 and pick_dtype("fp32") == torch.float32
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"compute\.device: 'abacus' is not available"):
        pick_device("abacus")


def test_a_mistral_tokenizer_with_the_wrong_pattern_is_corrected(tmp_path: Path) -> None:
    """Tokenizers of Mistral's large vocabulary were published with a pattern that does not split words at capitals."""
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "eB", "eBa", "eBay", "Ba", "Bay"]
    names += [f"<{at}>" for at in range(100_001 - len(names))]
    merges = [("e", "B"), ("eB", "a"), ("eBa", "y"), ("B", "a"), ("Ba", "y")]
    made = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, merges))
    wrong = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+"), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([wrong, bytes_of])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(tmp_path)
    shape = {"model_type": "mistral", "transformers_version": "4.50.0"}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert load_tokenizer(str(tmp_path)).tokenize("eBay") == ["e", "Bay"]
    (tmp_path / "config.json").write_text(json.dumps({**shape, "model_type": "llama"}))
    assert load_tokenizer(str(tmp_path)).tokenize("eBay") == ["eBay"]


SINGLE_DIGITS = pre_tokenizers.Digits(individual_digits=True)
WORDS = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "isolated")


@pytest.mark.parametrize(
    ("kind", "family", "first", "normalizer"),
    [
        ("GPT2Tokenizer", "llama", SINGLE_DIGITS, None),  # as SmolLM2 and StarCoder2
        ("GPT2Tokenizer", "granite", WORDS, None),
        ("LlamaTokenizerFast", "qwen2", SINGLE_DIGITS, None),  # as DeepSeek's distilled models
        ("GPTNeoXTokenizerFast", "gpt_neox", SINGLE_DIGITS, normalizers.NFKC()),
        (None, "qwen2", WORDS, normalizers.Lowercase()),
    ],
    ids=str,
)
def test_a_tokenizer_splits_as_its_file_says(
    kind: str | None, family: str, first: pre_tokenizers.PreTokenizer, normalizer: Any, tmp_path: Path
) -> None:
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", ">Ċ", ">ĊĊ", "hi"]
    merges = [("1", "2"), ("12", "3"), (">", "Ċ"), (">Ċ", "Ċ"), ("h", "i")]
    made = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, merges))
    if normalizer is not None:
        made.normalizer = normalizer
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=first is SINGLE_DIGITS)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([first, bytes_of]), decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    loaded = load_tokenizer(str(tmp_path))
    for text in ("Hi 12345", "a>\n\nb", "ﬁ e\u0301", "don't 7"):
        wanted = made.encode(text, add_special_tokens=False).ids
        assert loaded(text, add_special_tokens=False).input_ids == wanted
        assert loaded.decode(wanted) == made.decode(wanted)
        again = copy.deepcopy(loaded)  # as the encoder does
        assert again(text, add_special_tokens=False, split_special_tokens=True).input_ids == wanted
