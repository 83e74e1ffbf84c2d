"""`proper bench serve`: throughput and latency of multi-user serving from one model, against other implementations.

    base      the engine on the backbone alone
    one       the engine, every row from the same user
    mixed     the engine, every row from a different user: experts, routers and an adapter each
    crowd     the same, with no adapter loaded in a slot when the requests arrive
    plain     mixed without experts: an adapter each, which is all that PEFT can mix in a batch
    peft      PEFT's mixed batch (`adapter_names`) in transformers' generate
    generate  transformers' generate on the backbone, one padded batch
    loop      the same, one request after another, on a subset of the requests

All sides answer the same prompts, submitted at once, with the same number of tokens (closed loop); no answer ends
early. The cliff is measured in an open loop: requests arrive at random at a fixed share of the engine's throughput,
alternately with one slot per user and with 16 users per slot; the figure is the ratio of the 95th percentiles of the
time to first token. The noisy neighbour is an API key that keeps three requests per row open, beside a quiet key that
sends one request at a time. Its figures are 95th percentiles of the quiet key: the wait for a row in engine steps (1 is
the next step), and the time of a whole answer, beside that of the same key alone. `costs` has what `proper simulate`
reads. Weights are random except for `proper-nano`'s, since speed does not depend on them.
"""

from __future__ import annotations

import logging
import resource
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from proper.benchmarks.backbones import BenchBackbone
from proper.benchmarks.measure import interleaved, machine, percentile
from proper.benchmarks.serve_costs import serving_costs
from proper.benchmarks.serve_loads import ClosedLoop, Times, open_loop, quiet_key
from proper.benchmarks.serve_setup import CROWD, Served, ServedShape
from proper.config import LastLayers
from proper.models.backbone import EMBEDDED, pick_device

logger = logging.getLogger(__name__)

SHARES = (50, 95, 99)


@dataclass(frozen=True)
class ServeBenchSize:
    """Benchmark size.

    Attributes:
        hidden, inner, layers: hidden size, FFN size and layers of the random Llama.
        backbone: another backbone, measured in place of the random Llama and of `proper-nano`.
        adapted: decoder layers with experts and user adapters: all or the last so many.
        users: rows of the closed loop.
        alone: requests of the side `loop`.
        prompt, answer: tokens of each request; prompts have half to all of `prompt`.
        rows, slots: engine rows and adapter slots of the open loop.
        arrivals: requests of each of the open loop's two settings.
        load: arrival rate as a share of the closed loop's throughput.
        asks: requests of the quiet key beside its noisy neighbour, and of the same key alone.
    """

    hidden: int = 1024
    inner: int = 4096
    layers: int = 12
    backbone: BenchBackbone | None = None
    adapted: LastLayers = "all"
    users: int = 32
    alone: int = 2
    prompt: int = 64
    answer: int = 32
    repeats: int = 3
    rows: int = 6
    slots: int = 8
    arrivals: int = 160
    load: float = 0.5
    asks: int = 40
    dtype: torch.dtype = torch.bfloat16

    @property
    def backbones(self) -> dict[str, BenchBackbone]:
        """The measured backbones; the first is the headline's, with all loads."""
        if self.backbone is not None:
            return {self.backbone.name: self.backbone}
        heads = max(1, self.hidden // 64)
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 8192}
        return {"llama": BenchBackbone("llama", sizes), EMBEDDED: BenchBackbone()}

    def shape(self, backbone: BenchBackbone) -> ServedShape:
        """Return the shape of the model and its users."""
        users = max(2 * self.users, CROWD * self.slots)  # the crowd of the open loop is all users
        return ServedShape(backbone, self.adapted, self.dtype, users, self.users, self.prompt, self.answer)


QUICK = ServeBenchSize(layers=3, prompt=32, answer=16, repeats=2, arrivals=96, asks=20)


def run(size: ServeBenchSize, device: str) -> dict[str, Any]:
    """Return {"setting", "figures", "closed", "open", "noisy_neighbour", "memory_bytes", "costs"} of the benchmark.

    Args:
        size: benchmark size.
        device: "cpu", "cuda" or "auto".
    """
    place, closed = pick_device(device), dict[str, Any]()
    headline = next(iter(size.backbones))
    for name, backbone in reversed(size.backbones.items()):
        with tempfile.TemporaryDirectory(prefix="proper-bench-") as folder:
            served = Served(size.shape(backbone), backbone.load(size.dtype, place), place, Path(folder))
            loop = ClosedLoop(served, size.alone)
            logger.info(f"serve: {size.users} requests at once, {size.repeats} repeats of 8 sides, {name}")
            seconds = interleaved(loop.sides(), size.repeats, lambda line: logger.info(f"  {line}"))
            closed[name] = {side: _side_figures(loop.times[side], times) for side, times in seconds.items()}
            if name == headline:
                opened = _open(size, served, closed[name]["mixed"]["tokens_per_second"])
                neighbour = _neighbour(size, served)
                costs = serving_costs(served, size.users, size.answer, size.repeats)
                memory = served.memory(size.users)
            served.close()
    memory["peak_of_the_process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "setting": _setting(size, place),
        "figures": _figures(closed, headline, opened, neighbour),
        "closed": closed,
        "open": opened,
        "noisy_neighbour": neighbour,
        "memory_bytes": memory,
        "costs": costs,
    }


def _open(size: ServeBenchSize, served: Served, mixed: float) -> dict[str, Any]:
    """Run the open loop; the two settings alternate, so that other load on the machine affects both."""
    rate = size.load * mixed / size.answer * size.rows / size.users
    slots = {"resident": CROWD * size.slots, "crowded": size.slots}
    logger.info(f"serve: {size.arrivals} requests at {rate:.2f} a second, twice")
    times: dict[str, Times] = {kind: [] for kind in slots}
    for turn in (1, 2):
        for kind, count in slots.items():
            times[kind] += open_loop(served, size.rows, count, rate, size.arrivals // 2, seed=turn)
    return {"arrivals_per_second": round(rate, 3), **{kind: _latencies(found) for kind, found in times.items()}}


def _neighbour(size: ServeBenchSize, served: Served) -> dict[str, Any]:
    """Return the quiet key's waits in steps and seconds beside a flooding key, and its seconds alone."""
    logger.info(f"serve: {size.asks} requests of one key alone, then beside one that floods {size.users} rows")
    alone = quiet_key(served, size.users, size.asks, flooded=False)
    beside = quiet_key(served, size.users, size.asks, flooded=True)
    return {
        "wait_steps": _percentiles([float(count) for count in beside.steps]),
        "answer_seconds": _percentiles(beside.seconds),
        "answer_seconds_alone": _percentiles(alone.seconds),
    }


def _figures(
    closed: Mapping[str, Any], headline: str, opened: Mapping[str, Any], neighbour: Mapping[str, Any]
) -> dict[str, float]:
    rates = {
        name: {side: figures["tokens_per_second"] for side, figures in sides.items()} for name, sides in closed.items()
    }
    large, nano = rates[headline], rates.get(EMBEDDED) if headline != EMBEDDED else None
    first = {kind: opened[kind]["first_token_seconds"]["p95"] for kind in ("resident", "crowded")}
    figures = {
        "mixed_over_base": large["mixed"] / large["base"],
        "mixed_over_peft": large["plain"] / large["peft"],
        "cliff_p95_first_token": first["crowded"] / first["resident"],
        "crowd_over_mixed": large["crowd"] / large["mixed"],
        "plain_over_base": large["plain"] / large["base"],
        "base_over_generate": large["base"] / large["generate"],
        "noisy_neighbour_wait_steps": neighbour["wait_steps"]["p95"],
        "noisy_neighbour_seconds": neighbour["answer_seconds"]["p95"],
        "noisy_neighbour_alone_seconds": neighbour["answer_seconds_alone"]["p95"],
        "noisy_neighbour_over_alone": neighbour["answer_seconds"]["p95"] / neighbour["answer_seconds_alone"]["p95"],
    }
    if nano is not None:
        figures |= {"nano_mixed_over_base": nano["mixed"] / nano["base"]}
        figures |= {"nano_mixed_over_peft": nano["plain"] / nano["peft"]}
    return {name: round(value, 3) for name, value in figures.items()}


def _side_figures(times: Times, seconds: list[float]) -> dict[str, Any]:
    """Return one side's figures from the token `times` of all repeats and the `seconds` of each repeat."""
    tokens = sum(map(len, times)) / len(seconds)
    rate = round(tokens / statistics.median(seconds), 2)
    return {"tokens_per_second": rate, **_latencies(times), "seconds": [round(value, 3) for value in seconds]}


def _latencies(times: Times) -> dict[str, Any]:
    gaps = [after - before for stamps in times for before, after in zip(stamps, stamps[1:], strict=False)]
    firsts = [stamps[0] for stamps in times]
    return {"first_token_seconds": _percentiles(firsts), "token_seconds": _percentiles(gaps)}


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{share}": float(f"{percentile(values, share):.4g}") for share in SHARES}


def _setting(size: ServeBenchSize, device: torch.device) -> dict[str, Any]:
    if size.backbone is None:
        model = {"llama": f"random Llama, hidden {size.hidden}, FFN {size.inner}, {size.layers} layers"}
    else:
        model = size.backbone.setting()
    counts = {
        name: getattr(size, name)
        for name in ("users", "prompt", "answer", "repeats", "rows", "slots", "arrivals", "asks")
    }
    environment = {
        "machine": machine(device),
        "torch": torch.__version__,
        "dtype": str(size.dtype).removeprefix("torch."),
    }
    return {
        **model,
        "layers": size.adapted,
        **environment,
        **counts,
        "alone": size.alone,
        "load": size.load,
        "crowd": CROWD,
    }
