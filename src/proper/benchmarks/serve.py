"""`proper bench serve`: how fast many people are answered from one model, beside other ways to do it.

    base      the engine on the backbone alone
    one       the engine, every row the same user's
    mixed     the engine, every row another user's: experts, routers and an adapter each
    plain     the same without experts: an adapter each, which is all that PEFT can mix
    peft      PEFT's mixed batch (`adapter_names`) in transformers' generate
    generate  transformers' generate on the backbone, one padded batch

All sides answer the same prompts at once with the same number of tokens (closed loop); nobody ends early. The cliff is
measured in an open loop: requests arrive at random at a fixed share of what the engine can do, once with a slot for
every user and once with 16 users to a slot; the figure is the ratio of the 95th percentiles of the time to the first
token. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import copy
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from proper.adapters.cache import SlotCache
from proper.adapters.store import AdapterStore, UserRecord
from proper.benchmarks.timing import Side, interleaved, percentile
from proper.config import Config, make_config
from proper.data.batching import Encoder
from proper.errors import ProperError
from proper.inference.engine import Engine
from proper.inference.guests import Limits
from proper.inference.passes import pad_left
from proper.inference.personalized import PersonalizedModel
from proper.inference.requests import Event, Request, Token
from proper.inference.runner import Runner
from proper.inference.sampling import Sampling
from proper.layers.bank import AdapterBank
from proper.models.backbone import Backbone, digest, load_tokenizer, pick_device
from proper.models.personal import ProperModel
from proper.models.targets import find_targets

CROWD = 16
"""Users per slot where the cliff is looked for."""


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        users: rows of the closed loop.
        prompt, answer: tokens of each request.
        rows, slots: of the open loop.
        arrivals: requests of the open loop.
        load: which share of what the closed loop reached arrives.
    """

    hidden: int = 1024
    inner: int = 4096
    layers: int = 12
    users: int = 32
    prompt: int = 64
    answer: int = 32
    repeats: int = 3
    rows: int = 6
    slots: int = 8
    arrivals: int = 160
    load: float = 0.5
    dtype: torch.dtype = torch.bfloat16


QUICK = Size(layers=3, prompt=32, answer=16, repeats=2, arrivals=96)


def run(size: Size, device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Return {"setting", "figures", ...} of the benchmark.

    Args:
        size: what is measured.
        device: "cpu", "cuda" or "auto".
        say: hears what is being done.
    """
    place = pick_device(device)
    with tempfile.TemporaryDirectory(prefix="proper-bench-") as folder:
        bench = _Bench(size, place, Path(folder))
        say(f"serve: {size.users} requests at once, {size.repeats} repeats of 6 sides")
        seconds = interleaved(bench.sides(), size.repeats)
        rates = {name: size.users * size.answer / statistics.median(times) for name, times in seconds.items()}
        arriving = size.load * rates["mixed"] / size.answer * size.rows / size.users
        say(f"serve: {size.arrivals} requests at {arriving:.2f} a second, twice")
        first = {name: bench.open_loop(slots, arriving) for name, slots in bench.crowds().items()}
        bench.close()
    tails = {name: {f"p{share}": percentile(waits, share) for share in (50, 95, 99)} for name, waits in first.items()}
    return {
        "setting": _setting(size, place),
        "figures": {
            "mixed_over_base": round(rates["mixed"] / rates["base"], 3),
            "mixed_over_peft": round(rates["plain"] / rates["peft"], 3),
            "cliff_p95_first_token": round(tails["crowded"]["p95"] / tails["resident"]["p95"], 3),
            "plain_over_base": round(rates["plain"] / rates["base"], 3),
            "base_over_generate": round(rates["base"] / rates["generate"], 3),
        },
        "tokens_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "first_token_seconds": tails,
        "arrivals_per_second": round(arriving, 3),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": {name: [round(value, 3) for value in times] for name, times in seconds.items()},
    }


class _Bench:
    """One backbone, users for it in a store, and the sides that are compared."""

    def __init__(self, size: Size, device: torch.device, folder: Path) -> None:
        self.size, self.device = size, device
        limit = size.prompt + size.answer
        self.config = _config(limit)
        backbone = _backbone(size, device)
        self.bare = copy.deepcopy(backbone.model)
        self.peft = self._peft_model()
        self.model = ProperModel(backbone)
        self.model.add_experts(self.config.groups, seed=0)
        self.model.add_lora_router(self.config.users)
        self.mixtures = {name: (layer.experts, layer.router) for name, layer in self.model.layers.items()}
        self.store = AdapterStore(folder / "users")
        layout = self.model.layout(self.config.users.rank)
        self.names = [f"u{at}" for at in range(max(size.users, CROWD * size.slots))]
        self.store.put(self._records(layout.width))
        form: dict[str, Any] = {"device": device, "dtype": size.dtype}
        bank = AdapterBank(layout, 1, alpha=self.config.users.alpha, trainable=False, **form)
        self.model.use_bank(bank)
        encoder = Encoder(backbone.tokenizer, limit)
        encoder.end = None
        cache = SlotCache(self.store, bank, torch.zeros(self.model.embedding_size))
        self.personal = PersonalizedModel(self.model, encoder, self.config, cache, "users")
        self.alone = PersonalizedModel(self.model, encoder, self.config, None, "base")
        generator = random.Random(0)
        # Lengths differ, as people's do; the longest is `prompt`.
        lengths = [generator.randint(size.prompt // 2, size.prompt) for _ in range(size.users)]
        self.prompts = [tuple(generator.randint(3, 8000) for _ in range(length)) for length in lengths]

    def close(self) -> None:
        """Close the store."""
        self.personal.close()

    def sides(self) -> dict[str, Side]:
        """Return what is compared in the closed loop. Whatever a side needs in memory is there before it is timed."""
        limits = Limits(rows=self.size.users, slots=self.size.users, prefill=1 << 30, prefix_bytes=0)
        crowd = list(self.names[: self.size.users])
        engine: Engine | None = None

        def prepare(who: list[str], experts: bool = True, bare: bool = False) -> Callable[[int], None]:
            def work(_: int) -> None:
                nonlocal engine
                if engine is not None:
                    engine.close()
                for name, layer in self.model.layers.items():
                    layer.experts, layer.router = self.mixtures[name] if experts else (None, None)
                engine = Engine(self.alone if bare else self.personal, limits)
                _answer(engine, [Request((5,), user, sampling=Sampling(1)) for user in who])

            return work

        def answer(who: list[str]) -> Callable[[int], None]:
            def work(_: int) -> None:
                assert engine is not None
                sampling = Sampling(self.size.answer)
                pairs = zip(self.prompts, who, strict=True)
                _answer(engine, [Request(prompt, user, sampling=sampling) for prompt, user in pairs])

            return work

        one = crowd[:1] * len(crowd)
        return {
            "base": Side(answer(crowd), prepare(crowd, bare=True)),
            "one": Side(answer(one), prepare(one)),
            "mixed": Side(answer(crowd), prepare(crowd)),
            "plain": Side(answer(crowd), prepare(crowd, experts=False)),
            "peft": Side(lambda _: self._generate(self.peft, adapter_names=crowd)),
            "generate": Side(lambda _: self._generate(self.bare)),
        }

    def crowds(self) -> dict[str, int]:
        """Return the slots of the open loop's two turns; a turn of either kind comes first to warm up."""
        return {"resident": CROWD * self.size.slots, "crowded": self.size.slots}

    def open_loop(self, slots: int, rate: float) -> list[float]:
        """Return each request's seconds to its first token, with CROWD users to each of the smaller bank's slots."""
        for name, layer in self.model.layers.items():
            layer.experts, layer.router = self.mixtures[name]
        people = self.names[: CROWD * self.size.slots]
        engine = Engine(self.personal, Limits(rows=self.size.rows, slots=slots, prefix_bytes=0))
        _answer(engine, [Request((5,), user, sampling=Sampling(1)) for user in people])
        runner = Runner(engine)
        runner.start()
        draw = random.Random(1)
        begun, due, waits = time.perf_counter(), 0.0, list[float]()
        for at in range(self.size.arrivals):
            due += draw.expovariate(rate)
            time.sleep(max(0.0, begun + due - time.perf_counter()))
            prompt = self.prompts[at % len(self.prompts)]
            request = Request(prompt, draw.choice(people), sampling=Sampling(self.size.answer))
            engine.submit(request, _first(begun + due, waits))
        runner.drain(float("inf"))
        runner.stop()
        _check(engine)
        return waits

    def _generate(self, model: Any, **more: Any) -> None:
        ids, mask = pad_left(self.prompts, 0, self.device)
        length = self.size.answer
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0, use_cache=True
        )
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **more)

    def _records(self, width: int) -> Iterator[UserRecord]:
        layout = self.model.layout(self.config.users.rank)
        for at, name in enumerate(self.names):
            generator = torch.Generator().manual_seed(at)
            row = (0.02 * torch.randn(width, generator=generator)).to(torch.bfloat16)
            embedding = torch.randn(self.model.embedding_size, generator=generator)
            yield UserRecord(name, "users", embedding, layout.unpack(row))

    def _peft_model(self) -> Any:
        """Return PEFT's model with one LoRA for each row, on the same modules and of the same rank."""
        rank, names = self.config.users.rank, [f"u{at}" for at in range(self.size.users)]
        model = copy.deepcopy(self.bare)
        targets = list(find_targets(model, self.config.groups.target_modules))
        lora = LoraConfig(
            r=rank, lora_alpha=int(self.config.users.alpha), target_modules=targets, init_lora_weights=False
        )
        wrapped: Any = get_peft_model(model, lora, adapter_name=names[0])
        for name in names[1:]:
            wrapped.add_adapter(name, lora)
        return wrapped.to(self.size.dtype).eval()


def _backbone(size: Size, device: torch.device) -> Backbone:
    shape: dict[str, Any] = {
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 64,
        "num_key_value_heads": size.hidden // 64,
        "vocab_size": 8192,
        "pad_token_id": 0,
        "eos_token_id": None,
        "attn_implementation": "eager" if device.type == "cpu" else "sdpa",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**shape))
    model.to(device=device, dtype=size.dtype).eval().requires_grad_(False)
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    return Backbone("random", model, load_tokenizer("proper-nano"), digest(model))


def _config(limit: int) -> Config:
    return make_config({"data": {"path": "none"}, "compute": {"max_length": limit}})


def _answer(engine: Engine, requests: list[Request]) -> None:
    """Run requests to their end on this thread."""
    for request in requests:
        engine.submit(request, lambda event: None)
    while not engine.idle:
        with engine.changed:
            engine.changed.wait_for(lambda: not engine.blocked)
        engine.step()
    _check(engine)


def _check(engine: Engine) -> None:
    stats = engine.stats()
    if stats.errors or stats.fallbacks:
        raise ProperError(f"bench serve: {stats.errors} requests failed, {stats.fallbacks} lost their adapter")


def _first(due: float, waits: list[float]) -> Callable[[Event], None]:
    """Return a sink that notes when the first token comes."""
    seen = False

    def note(event: Event) -> None:
        nonlocal seen
        if isinstance(event, Token) and not seen:
            seen = True
            waits.append(time.perf_counter() - due)

    return note


def _setting(size: Size, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        **{key: str(value) if isinstance(value, torch.dtype) else value for key, value in asdict(size).items()},
        "crowd": CROWD,
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
