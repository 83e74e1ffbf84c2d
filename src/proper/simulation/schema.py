"""Settings of `proper simulate`: users and their activity, cluster, costs, refits, storage, prices, targets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from proper.config.section import Section


class TokenCounts(Section):
    """Distribution of a number of tokens: lognormal, rounded, at least 1.

    Attributes:
        mean: mean number of tokens.
        cv: coefficient of variation (standard deviation over mean); 0 makes every request alike.
    """

    mean: float = Field(default=100.0, ge=1)
    cv: float = Field(default=0.0, ge=0, le=10)


class ActivityConfig(Section):
    """Who sends requests, and when.

    The k-th most active user sends requests in proportion to (k + shift) ** -zipf (Zipf-Mandelbrot). The rate over a
    day is a cosine around its mean.

    Attributes:
        requests_per_user_day: mean number of requests of a user in a day.
        zipf: exponent of the activity; 0 makes all users equally active.
        shift: flattens the head: with 0 and an exponent near 1, one user would send a large share of all requests.
        daily_swing: height of the daily cycle: the busiest hour has 1 + daily_swing times the mean rate.
        peak_hour: the busiest hour of the day, 0 to 24.
        prompt_tokens: tokens of a prompt.
        answer_tokens: tokens of an answer.
        adapted: share of the users who have an adapter; the others are answered by the group model.
    """

    requests_per_user_day: float = Field(default=5.0, gt=0)
    zipf: float = Field(default=0.8, ge=0, le=3)
    shift: float = Field(default=10.0, ge=0)
    daily_swing: float = Field(default=0.6, ge=0, le=1)
    peak_hour: float = Field(default=20.0, ge=0, le=24)
    prompt_tokens: TokenCounts = TokenCounts(mean=200.0, cv=0.5)
    answer_tokens: TokenCounts = TokenCounts(mean=100.0, cv=0.5)
    adapted: float = Field(default=1.0, ge=0, le=1)


class ClusterConfig(Section):
    """Replicas of the server, and how requests are routed to them.

    Attributes:
        replicas: number of replicas; `auto` finds the smallest number that meets the targets with affinity.
        rows: requests that a replica decodes at once (`proper serve --rows`).
        slots: adapters in a replica's memory (`proper serve --slots`); at least `rows`.
        loaders: adapter loads that a replica runs at once; the server has one loading thread.
        prefill_tokens: maximum number of prompt tokens of one prefill, with all prompts padded to the longest.
        patience: how often a request whose adapter is not loaded may be overtaken.
        local_adapters: adapters that a replica keeps on its own disk; `all` keeps every adapter there.
        spill: waiting requests of a replica from which on it is full, and its users' requests may go to another one.
    """

    replicas: int | Literal["auto"] = "auto"
    rows: int = Field(default=32, ge=1)
    slots: int = Field(default=40, ge=1)
    loaders: int = Field(default=1, ge=1)
    prefill_tokens: int = Field(default=2048, ge=1)
    patience: int = Field(default=16, ge=0)
    local_adapters: int | Literal["all"] = "all"
    spill: int = Field(default=8, ge=0)

    @field_validator("replicas", "local_adapters")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"should be at least 1, not {value}")
        return value


class CostConfig(Section):
    """Measured costs: files of `proper bench ... --json`, or values, which take precedence over the files.

    Attributes:
        serve: file of `proper bench serve`: decoding step by batch size, prefill, cold load.
        users: file of `proper bench users`: time of a fit.
        store: file of `proper bench store`: bytes of an adapter on disk, and a cold load where `serve` has none.
        step_seconds: seconds of one decoding step by number of rows; linear between two sizes.
        prefill_seconds: seconds of a prefill whatever its length.
        prefill_token_seconds: further seconds per prompt token, padding included.
        load_seconds: seconds of a cold load: an adapter from the local disk into a slot.
        remote_seconds: seconds to fetch an adapter from another machine's disk or object storage to the local one.
        request_seconds: seconds that HTTP, tokenizer and router add to every request; nothing waits for them.
        variation: coefficient of variation of the time of one forward pass; from `serve`, else 0: constant.
        fit_seconds: seconds of a fit worker per refitted user.
    """

    serve: str | None = None
    users: str | None = None
    store: str | None = None
    step_seconds: dict[int, float] | None = None
    prefill_seconds: float | None = Field(default=None, ge=0)
    prefill_token_seconds: float | None = Field(default=None, ge=0)
    load_seconds: float | None = Field(default=None, ge=0)
    remote_seconds: float = Field(default=0.0, ge=0)
    request_seconds: float = Field(default=0.0, ge=0)
    variation: float | None = Field(default=None, ge=0, le=5)
    fit_seconds: float | None = Field(default=None, gt=0)

    @field_validator("step_seconds")
    @classmethod
    def _sizes(cls, value: dict[int, float] | None) -> dict[int, float] | None:
        if value is not None and (not value or min(value) < 1 or min(value.values()) < 0):
            raise ValueError("should be seconds, at least 0, by number of rows, at least 1: {1: 0.01, 32: 0.02}")
        return value


class RefitConfig(Section):
    """Refits of users who have new interactions.

    Attributes:
        per_request: share of the requests after which the request's user is due for a refit.
        workers: fit workers; `auto` finds the smallest number that meets `targets.missed_refits`.
        deadline_hours: hours from becoming due to the end of the refit.
    """

    per_request: float = Field(default=0.1, ge=0, le=1)
    workers: int | Literal["auto"] = "auto"
    deadline_hours: float = Field(default=24.0, gt=0)


class StorageConfig(Section):
    """Bytes on disk or in object storage.

    Attributes:
        adapter_bytes: bytes of one adapter on disk; from the file `costs.store` if not given.
        versions: versions kept of every user.
        interaction_bytes: bytes of interactions and manifest per user.
    """

    adapter_bytes: float | None = Field(default=None, ge=0)
    versions: int = Field(default=2, ge=1)
    interaction_bytes: float = Field(default=4096.0, ge=0)


class PriceConfig(Section):
    """Prices, in any currency.

    Attributes:
        replica_hour: price of the machine of one replica for an hour.
        worker_hour: price of the machine of one fit worker for an hour.
        storage_gb_month: price of a gigabyte (10 ** 9 bytes) stored for a month.
    """

    replica_hour: float = Field(default=1.0, ge=0)
    worker_hour: float = Field(default=1.0, ge=0)
    storage_gb_month: float = Field(default=0.02, ge=0)


class TargetConfig(Section):
    """Targets for `auto`.

    Attributes:
        first_token_p95: maximum of the 95th percentile of the time to the first token in the busiest hour, in seconds.
        missed_refits: largest share of refits that miss their deadline.
    """

    first_token_p95: float = Field(default=1.0, gt=0)
    missed_refits: float = Field(default=0.01, gt=0, le=1)


class SampleConfig(Section):
    """How much of the cluster and of the day is simulated.

    Attributes:
        replicas: replicas that are simulated at once, as a slice of the cluster with its share of the users.
        requests: maximum number of requests of the simulated day. A day with more is shortened: the daily cycle runs
            faster, while every rate and every cost keeps its size.
    """

    replicas: int = Field(default=4, ge=1, le=64)
    requests: int = Field(default=100_000, ge=1000)


class SimulationConfig(Section):
    """All settings of a simulation.

    Attributes:
        users: number of users.
        seed: seed of all random draws.
        activity: who sends requests, and when.
        cluster: replicas and routing.
        costs: measured costs.
        refits: refits of users who have new interactions.
        storage: bytes per user.
        prices: prices of machines and storage.
        targets: what `auto` has to meet.
        sample: how much is simulated.
    """

    users: int = Field(ge=1, le=10**9)
    seed: int = Field(default=0, ge=0)
    activity: ActivityConfig = ActivityConfig()
    cluster: ClusterConfig = ClusterConfig()
    costs: CostConfig = CostConfig()
    refits: RefitConfig = RefitConfig()
    storage: StorageConfig = StorageConfig()
    prices: PriceConfig = PriceConfig()
    targets: TargetConfig = TargetConfig()
    sample: SampleConfig = SampleConfig()

    @field_validator("cluster")
    @classmethod
    def _slots(cls, value: ClusterConfig) -> ClusterConfig:
        if value.slots < value.rows:
            raise ValueError(f"slots ({value.slots}) should be at least rows ({value.rows})")
        return value
