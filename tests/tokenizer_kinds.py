"""A small tokenizer of every kind that language models use, trained on the spot on a few sentences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from proper.models.backbone import load_tokenizer

TEXTS = [
    "it's fine, don't worry. the bus was late again! was it?",
    "they've said: \"we're here\", I'm sure it isn't what he'd say . really ?",
    "price 3 < 4 > 2, / | im_end start <b>bold</b> [SEP] [x] é ü 🎈",
] * 4
MARKS = ["<pad>", "<s>", "</s>", "<unk>"]
NAMES = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _fast(made: Tokenizer, **more: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=made, **NAMES, **more)


def chatml() -> Any:
    """Byte-level BPE with ChatML's control tokens, and one added token that is not special, as Qwen's `<think>`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    )
    found = _fast(made)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found.add_tokens([AddedToken("<think>", special=False)])
    return found


def byte_fallback() -> Any:
    """SentencePiece's BPE as Llama 2 has it: `▁` for spaces, bytes for what is in no vocabulary."""
    letters = sorted({letter for text in TEXTS for letter in text if letter.isascii()} - {" "}) + ["▁"]
    words = [*MARKS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁t", "he", "▁the"]
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(made)


def unigram() -> Any:
    """SentencePiece's Unigram: the control tokens are words of its vocabulary."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=120, special_tokens=MARKS, unk_token="<unk>", show_progress=False)
    )
    return _fast(made, clean_up_tokenization_spaces=True)


def word_level() -> Any:
    """Whole words between spaces."""
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=MARKS, show_progress=False))
    return _fast(made)


def word_piece() -> Any:
    """BERT's, which cleans up: no end token, prompts begin with [CLS]."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        TEXTS,
        trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
        ),
    )
    return BertTokenizerFast(vocab=made.get_vocab(), clean_up_tokenization_spaces=True)


KINDS: dict[str, Callable[[], Any]] = {
    "nano": lambda: load_tokenizer("proper-nano"),
    "chatml": chatml,
    "byte_fallback": byte_fallback,
    "unigram": unigram,
    "word_level": word_level,
    "word_piece": word_piece,
}
