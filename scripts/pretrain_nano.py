"""Pre-train a small English model from scratch, its tokenizer included; `proper-nano` was made by this script.

    tokenizer   byte-level BPE, trained on the `train` split
    tokens      every document as <s> text </s>, one stream of 16-bit numbers per source and split
    model       Llama with tied embeddings; fp32 weights, products in bf16; saved in bf16
    batches     windows at random places of the streams; `--mixture` says how often a source is drawn
    rate        rises over the first steps, stays, falls to zero along a line (warm-up, stable, decay)

Every batch follows from the seed and the number of its step, so a run that was killed goes on with the same command and
ends in the same weights (not with `--minutes`: then the rate follows the clock). Knows nothing about personalization.

    python scripts/pretrain_nano.py TEXTS.parquet --out runs/nano     columns: text, split (train, valid), source
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from proper.errors import DataError, InputError, NonFiniteLossError, ProperError, RunFolderError
from proper.files import read_json, write_json, write_text
from proper.models.backbone import pick_device
from proper.models.checkpoints import load_tensors, save_tensors
from proper.training.checkpoint import adamw_tensors, restore_adamw, seed_of

PAD, START, END = "<pad>", "<s>", "</s>"
Streams = dict[str, np.ndarray[Any, np.dtype[np.uint16]]]


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """What the weights depend on; the defaults are the model that ships."""

    vocabulary: int = _flag(8192, "tokens, the three special ones included")
    width: int = _flag(320, "hidden size")
    layers: int = _flag(8, "transformer blocks")
    heads: int = _flag(5, "attention heads")
    ffn: int = _flag(896, "FFN size")
    context: int = _flag(1024, "longest input that the config allows")
    window: int = _flag(256, "tokens of a training row")
    batch: int = _flag(16, "rows of a step")
    steps: int = _flag(5741, "steps at most")
    minutes: float = _flag(0.0, "minutes of training at most, over all sessions; 0: no limit")
    rate: float = _flag(3e-3, "highest learning rate")
    warmup: int = _flag(200, "steps of rising rate")
    hold: float = _flag(0.645, "share of the steps (or minutes) after which the rate falls")
    weight_decay: float = _flag(0.1, "on matrices")
    clip: float = _flag(1.0, "largest gradient norm")
    mixture: str = _flag("gutenberg=0.6", "SOURCE=SHARE,...; sources not named share the rest by size")
    validate_every: int = _flag(1000, "steps between two validations")
    seed: int = _flag(0, "everything random follows from it")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Pre-train a small English model from scratch.")
    parser.add_argument("texts", type=Path, help="Parquet file with the columns text, split and source")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; the same command goes on")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--checkpoint-every", type=int, default=200, help="steps between checkpoints (default: 200)")
    parser.add_argument("--pause-at", type=int, default=None, help="stop after this step; the same command goes on")
    for flag in fields(Recipe):
        name = "--" + flag.name.replace("_", "-")
        text = f"{flag.metadata['help']} (default: {flag.default})"
        parser.add_argument(name, type=type(flag.default), default=flag.default, help=text)
    given = vars(parser.parse_args(arguments))
    recipe = Recipe(**{flag.name: given[flag.name] for flag in fields(Recipe)})
    try:
        pretrain(given["texts"], given["out"], recipe, given["device"], given["checkpoint_every"], given["pause_at"])
    except ProperError as error:
        print(f"pretrain_nano: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def pretrain(texts: Path, out: Path, recipe: Recipe, device: str, checkpoint_every: int, pause_at: int | None) -> None:
    """Do whatever is still to do in `out`.

    Raises:
        InputError: an impossible setting, a file without the columns, or a folder made with other settings.
    """
    work = out / "work"
    _check(recipe)
    _claim(out, work, {"texts": texts.name, **asdict(recipe)})
    tokenizer = _tokenizer(texts, work, recipe)
    index = _tokenize(texts, work, tokenizer)
    training = Training(recipe, work, _streams(work, index, "train"), _streams(work, index, "valid"), device)
    if not training.run(checkpoint_every, pause_at):
        return
    characters = sum(entry["characters"] for entry in index["valid"].values())
    model = training.model.bfloat16()
    loss, tokens = validation_loss(model, training.valid, recipe.window)
    bits = loss * tokens / math.log(2) / max(1, characters)
    training.say(f"final valid {loss:.4f} nats a token, {bits:.3f} bits a character, {training.seen} tokens seen")
    _save(model, tokenizer, recipe, work, out, training.lines)


def _check(recipe: Recipe) -> None:
    if recipe.width % (2 * recipe.heads):
        raise InputError(f"--width {recipe.width} over --heads {recipe.heads} is not an even number")
    if not 260 <= recipe.vocabulary <= 65536:
        raise InputError(f"--vocabulary {recipe.vocabulary} is not between 260 (bytes, special tokens) and 65536")
    if not 0 <= recipe.hold < 1:
        raise InputError(f"--hold {recipe.hold} is not at least 0 and below 1")


def _claim(out: Path, work: Path, settings: dict[str, Any]) -> None:
    """Start a work folder, or go on in one with the same settings."""
    path = work / "settings.json"
    if path.exists():
        other = {key: value for key, value in read_json(path).items() if settings.get(key) != value}
        for key, value in other.items():
            raise RunFolderError(f"{out}: begun with {key} {value}, not {settings.get(key)}; take another --out")
    elif (out / "model.safetensors").exists():
        raise RunFolderError(f"{out}: holds a finished model; take another --out")
    write_json(path, settings)


def _documents(texts: Path) -> Iterator[list[dict[str, str]]]:
    try:
        file = parquet.ParquetFile(texts)
        lacking = {"text", "split", "source"} - set(file.schema_arrow.names)
        if lacking:
            raise DataError(f"{texts}: there is no column {', '.join(sorted(lacking))}")
        for batch in file.iter_batches(batch_size=256, columns=["text", "split", "source"]):
            yield batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{texts}: not readable as Parquet: {str(error).splitlines()[0]}") from error


def _tokenizer(texts: Path, work: Path, recipe: Recipe) -> Tokenizer:
    path = work / "tokenizer.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=recipe.vocabulary,
            special_tokens=[PAD, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        pieces = (row["text"] for rows in _documents(texts) for row in rows if row["split"] == "train")
        tokenizer.train_from_iterator(pieces, trainer)
        write_text(path, tokenizer.to_str())
    return Tokenizer.from_file(str(path))


def _tokenize(texts: Path, work: Path, tokenizer: Tokenizer) -> dict[str, dict[str, dict[str, Any]]]:
    """Write the streams; return split -> source -> {file, tokens, characters}."""
    path = work / "tokens.json"
    if path.exists():
        return cast(dict[str, dict[str, dict[str, Any]]], read_json(path))
    for half_written in work.glob("*.u16"):
        half_written.unlink()
    tokenizer.encode_special_tokens = True  # a document that says "</s>" does not end there
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    index: dict[str, dict[str, dict[str, Any]]] = {"train": {}, "valid": {}}
    for rows in _documents(texts):
        for row, coded in zip(rows, tokenizer.encode_batch_fast([row["text"] for row in rows]), strict=True):
            if row["split"] not in index:
                raise DataError(f"{texts}: split is {row['split']!r}, neither train nor valid")
            sources = index[row["split"]]
            new = {"file": f"{row['split']}-{len(sources)}.u16", "tokens": 0, "characters": 0}
            entry = sources.setdefault(row["source"], new)
            ids = np.array([start, *coded.ids, end], dtype=np.uint16)
            with (work / entry["file"]).open("ab") as file:
                file.write(ids.tobytes())
            entry["tokens"] += len(ids)
            entry["characters"] += len(row["text"])
    write_json(path, index)
    return index


def _streams(work: Path, index: dict[str, dict[str, dict[str, Any]]], split: str) -> Streams:
    return {source: np.memmap(work / entry["file"], np.uint16, "r") for source, entry in sorted(index[split].items())}


def shares(mixture: str, streams: Streams) -> dict[str, float]:
    """Return how often each source is drawn.

    Raises:
        InputError: a share cannot be read, its source does not exist, or the shares are more than 1.
    """
    named: dict[str, float] = {}
    for part in filter(None, mixture.split(",")):
        source, _, share = part.rpartition("=")
        try:
            named[source] = float(share)
        except ValueError as error:
            raise InputError(f"--mixture {part}: write it as SOURCE=SHARE") from error
        if source not in streams:
            raise InputError(f"--mixture {part}: the sources are {', '.join(streams)}")
    rest = {source: len(stream) for source, stream in streams.items() if source not in named}
    left = 1 - sum(named.values())
    if min(named.values(), default=0) < 0 or left < 0 or (not rest and left > 1e-9):
        raise InputError(f"--mixture {mixture}: the shares are not 1 in all")
    return named | {source: left * size / sum(rest.values()) for source, size in rest.items()}


def draw(streams: Streams, chances: dict[str, float], recipe: Recipe, step: int) -> Tensor:
    """Return a step's rows (batch, window + 1); they depend on the seed and the step only."""
    random = np.random.default_rng(seed_of(recipe.seed, "batch", step))
    rows = []
    for source in random.choice(list(chances), size=recipe.batch, p=list(chances.values())):
        at = random.integers(len(streams[source]) - recipe.window)
        rows.append(streams[source][at : at + recipe.window + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def mean_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Return the mean loss of predicting each token of the rows (B, T + 1) from those before it, in nats."""
    rows = rows.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def validation_loss(model: LlamaForCausalLM, streams: Streams, window: int) -> tuple[float, int]:
    """Return the mean loss over all tokens of all validation streams, in nats, and how many tokens there are."""
    total, tokens = 0.0, 0
    for stream in streams.values():
        count = (len(stream) - 1) // window
        for at in range(0, count, 32):
            starts = range(at * window, min(at + 32, count) * window, window)
            rows = np.stack([stream[s : s + window + 1].astype(np.int64) for s in starts])
            with torch.no_grad():
                total += float(mean_loss(model, torch.from_numpy(rows))) * len(starts) * window
            tokens += len(starts) * window
    return total / max(1, tokens), tokens


class Training:
    """The model, its optimizer, and how far they are."""

    def __init__(self, recipe: Recipe, work: Path, train: Streams, valid: Streams, device: str) -> None:
        short = [source for source, stream in train.items() if len(stream) <= recipe.window + 1]
        if short or not train:
            raise DataError(f"the train split has fewer tokens than one window: {', '.join(short) or 'it is empty'}")
        self.recipe, self.train, self.valid = recipe, train, valid
        self.checkpoint = work / "training.checkpoint"
        self.chances = shares(recipe.mixture, train)
        self.model = _fresh_model(recipe, pick_device(device))
        self.parameters = dict(self.model.named_parameters())
        groups = [
            {"params": [p for p in self.parameters.values() if p.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in self.parameters.values() if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95))
        self.step, self.seconds, self.losses, self.lines = 0, 0.0, list[float](), list[str]()
        if self.checkpoint.exists():
            self._resume()

    @property
    def seen(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.recipe.batch * self.recipe.window

    @property
    def progress(self) -> float:
        """Share of the steps, or of the minutes where that is more."""
        limit = self.recipe.minutes * 60
        return max(self.step / self.recipe.steps, self.seconds / limit if limit else 0.0)

    def run(self, checkpoint_every: int, pause_at: int | None) -> bool:
        """Train to the end, or to the pause; return whether the end is reached."""
        while self.progress < 1:
            if pause_at is not None and self.step >= pause_at:
                self._save()
                return False
            started = time.monotonic()
            self._advance()
            self.seconds += time.monotonic() - started
            if self.step % 100 == 0:
                self.say(f"{self.step} {self.seconds:.0f}s loss {np.mean(self.losses):.3f} rate {self._rate():.2e}")
                self.losses.clear()
            if self.step % self.recipe.validate_every == 0:
                loss, _ = validation_loss(self.model, self.valid, self.recipe.window)
                self.say(f"valid {loss:.4f}")
            if self.step % checkpoint_every == 0:
                self._save()
        self._save()
        return True

    def say(self, line: str) -> None:
        """Print a line and keep it for the log."""
        self.lines.append(line)
        print(line, flush=True)

    def _advance(self) -> None:
        loss = mean_loss(self.model, draw(self.train, self.chances, self.recipe, self.step))
        if not bool(torch.isfinite(loss)):
            raise NonFiniteLossError(f"the loss at step {self.step + 1} is {float(loss)}; try a lower --rate")
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self.step += 1

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / self.recipe.warmup) if self.recipe.warmup else 1.0
        return self.recipe.rate * warm * min(1.0, (1 - self.progress) / (1 - self.recipe.hold))

    def _save(self) -> None:
        metadata = {"step": self.step, "seconds": self.seconds, "losses": self.losses, "lines": self.lines}
        save_tensors(self.checkpoint, adamw_tensors(self.optimizer, self.parameters), metadata)

    def _resume(self) -> None:
        tensors, metadata = load_tensors(self.checkpoint)
        restore_adamw(self.optimizer, self.parameters, tensors)
        self.step, self.seconds, self.losses, self.lines = (metadata[k] for k in ("step", "seconds", "losses", "lines"))


def _fresh_model(recipe: Recipe, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(seed_of(recipe.seed, "weights") % 2**63)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    # Fused attention pays on a GPU only, for windows as short as these.
    config._attn_implementation = "eager" if device.type == "cpu" else "sdpa"
    model: Any = LlamaForCausalLM(config)
    return cast(LlamaForCausalLM, model.to(device))


def _save(
    model: LlamaForCausalLM, tokenizer: Tokenizer, recipe: Recipe, work: Path, out: Path, lines: Sequence[str]
) -> None:
    """Put the model into `out`, its weights last, and clear the work folder away."""
    folder = work / "model"
    model.save_pretrained(folder)
    special = {"pad_token": PAD, "bos_token": START, "eos_token": END}
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, model_max_length=recipe.context, **special).save_pretrained(folder)
    write_text(out / "train.log", "".join(f"{line}\n" for line in lines))
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(path, out / path.name)
    shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
