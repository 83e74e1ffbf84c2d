"""Runs one seed's three training stages in a run folder; resumes an interrupted stage and skips a finished one.

    population/  a PEFT adapter     groups/  experts, routers, mean embedding     users/  the adapter store

A stage is done when its `stage.json` exists; it is written last.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

from proper.adapters.store import AdapterStore, UserRecord
from proper.config import Config
from proper.data.batching import RowEncoder
from proper.data.encoder import Encoder
from proper.data.histories import Histories, Role, SampledRows
from proper.data.stage_sample import SharedStage, stage_sample
from proper.data.task_weights import with_task_weights
from proper.errors import RunFolderError
from proper.files import hash_file, write_json
from proper.models.backbone import configured_backbone, pick_device
from proper.models.checkpoints import bases_digest, load_groups, save_tensors, settled
from proper.models.memory import give_back_memory
from proper.models.peft_merge import apply_population
from proper.models.personal import ProperModel
from proper.models.user_encoder import save_encoder
from proper.run_folder import PEFT_WEIGHTS, RunFolder, Stage, Tier
from proper.training.bases import train_bases
from proper.training.checkpoint import Checkpoint, seed_of
from proper.training.early_stopping import hold_out
from proper.training.expert_count import find_experts, user_scores
from proper.training.groups import first_embeddings, train_groups
from proper.training.metrics_log import Log, no_log
from proper.training.plans import NOT_COVERED, Guarantee, guarantee, stage_plan
from proper.training.population import train_population
from proper.training.privacy import noised_mean, secret_generator
from proper.training.starts import train_start
from proper.training.trainer import TrainingPlan
from proper.training.user_encoder import TrainedEmbeddings, train_encoder
from proper.training.user_stage import FitAdapters, UserStage
from proper.training.users import train_users

logger = logging.getLogger(__name__)


def join_processes(config: Config) -> Accelerator:
    """Return the `Accelerator` of this process among those of `accelerate launch`; without it, a single process."""
    device = pick_device(config.compute.device)
    if device.type == "cuda" and device.index is not None:
        # Without this, a single process would use the first device instead of the requested one.
        torch.cuda.set_device(device)
    # Stage 3 and evaluation run in one process; the others wait for it far longer than the default ten minutes.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=30))
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[patient])


class StageRunner:
    """The stages of one seed.

    Attributes:
        folder: the seed's run folder.
        encoder: turns texts into tokens.
        rows: turns the rows of stage 1 into training rows.
        personal: turns the rows of stages 2 and 3 into training rows.
    """

    def __init__(
        self,
        config: Config,
        dataset: Histories,
        folder: Path,
        seed: int,
        log: Log,
        personal: Callable[[Encoder], RowEncoder] | None = None,
    ) -> None:
        self.dataset, self.folder, self.seed, self.log, self.run_folder = dataset, folder, seed, log, RunFolder(folder)
        self.config = settled(config, self.run_folder.experts)
        self.accelerator = join_processes(config)
        self.backbone, self._is_used = configured_backbone(config, self.accelerator.device), False
        self.encoder = self.backbone.encoder()
        self.rows = with_task_weights(config, dataset, self.encoder, seed)
        self.personal = self.rows if personal is None else personal(self.encoder)

    def run(self, stages: Sequence[str], fitting: FitAdapters | None = None) -> None:
        """Train the given stages, in their order; earlier stages must be done.

        Args:
            stages: any of `Stage`.
            fitting: fits the users' adapters in other processes; None: this process does.

        Raises:
            RunFolderError: the predecessor of a given stage is neither done nor given.
        """
        last = max((list(Stage).index(Stage(stage)) for stage in stages), default=-1)
        self._population(Stage.POPULATION in stages)
        if last < 1:
            return
        model = ProperModel(self.backbone)
        with model.caching(self.folder, self.config.compute.cache_mb):
            self._groups(model, Stage.GROUPS in stages)
            if last == 2:
                self._users(model, fitting)

    def trained_groups(self) -> ProperModel:
        """Return the model with the trained stages 1 and 2, on which users are fitted.

        Raises:
            RunFolderError: one of the stages is not trained yet.
        """
        self._population(wanted=False)
        model = ProperModel(self.backbone)
        self._groups(model, wanted=False)
        return model

    @cached_property
    def guarantee(self) -> Guarantee | None:
        """The privacy of stages 1 and 2, logged once; None without it."""
        found = guarantee(self.config, self.dataset)
        if found is not None:
            logger.info(found.line())
            logger.info(NOT_COVERED)
        return found

    def _population(self, wanted: bool) -> None:
        if self._is_used:  # by an earlier call, which has merged stage 1 into it and put layers into it
            self.backbone = configured_backbone(self.config, self.accelerator.device)
        self._is_used, folder = True, self.run_folder.population
        if self._is_done(Stage.POPULATION, wanted):
            apply_population(self.backbone, folder)
            return
        self._require_untrained(Stage.GROUPS, "a population that no longer exists")
        config = self.config.population
        sample = stage_sample(self.dataset, "population", self.config, self.seed)
        rows, held_out = hold_out(sample, config.held_out_share, self.config.compute.max_length)
        sizes = {"rows": rows.size, "tokens": rows.tokens, "held_out_rows": len(held_out)}
        with self._recorded(Stage.POPULATION, sizes) as metadata:
            plan = self._plan("population", rows)
            train_population(self.backbone, config, plan, held_out, self.accelerator, folder)
            if self.accelerator.is_main_process:
                metadata["sha256"] = hash_file(folder / PEFT_WEIGHTS)

    def _groups(self, model: ProperModel, wanted: bool) -> None:
        if self._is_done(Stage.GROUPS, wanted):
            if self.accelerator.is_main_process:
                load_groups(model, self.config.groups, self.run_folder.experts, len(self.config.tasks))
            return
        self._require_untrained(Stage.USERS, "groups that no longer exist")
        config = self.config.groups
        sample = stage_sample(self.dataset, "groups", self.config, self.seed)
        role: Role | None = "target" if config.train_on == "targets" else None
        users = [user.id for user in self.dataset.users(role) if user.history > 0]
        sizes = {"rows": sample.size, "tokens": sample.tokens, "users": len(users)}
        with self._recorded(Stage.GROUPS, sizes) as metadata:
            self._settle_experts(model, users, sample)
            metadata["experts"] = self.config.groups.experts
            embeddings = self._train_groups(model, users, self._plan("groups", sample))
            if self.accelerator.is_main_process:
                self._save_groups(model, users, embeddings)
                self._save_encoder(model, users, embeddings, sample)

    def _settle_experts(self, model: ProperModel, users: Sequence[str], sample: SampledRows) -> None:
        """Replace `groups.experts: auto` by the number that a first training finds."""
        if self.config.groups.experts != "auto":
            return
        checkpoint = Checkpoint(self.run_folder.finding_experts, self.config.compute.checkpoint_seconds)
        plan = replace(self._plan("groups", sample), checkpoint=checkpoint, log=no_log)
        train = lambda: user_scores(model, self._train_groups(model, users, plan))  # noqa: E731
        self.config = find_experts(self.config, self.run_folder.found_experts, train, self.accelerator)
        checkpoint.remove()

    def _train_groups(self, model: ProperModel, users: Sequence[str], plan: TrainingPlan) -> Tensor:
        model.add_experts(self.config.groups, seed_of(self.seed, "experts"), len(self.config.tasks))
        return train_groups(model, self.config.groups, users, plan, self.accelerator)

    def _save_groups(self, model: ProperModel, users: Sequence[str], embeddings: Tensor) -> None:
        mean, private = embeddings.mean(0), self.guarantee
        if private is not None:
            bound = self.config.groups.embedding_init * embeddings.shape[1] ** 0.5  # the usual norm before training
            mean = noised_mean(embeddings, private.settings, bound, secret_generator())
        tensors = {**model.group_parameters(), "mean_embedding": mean}
        save_tensors(self.run_folder.experts, tensors, {"modules": list(model.layers)})
        store = AdapterStore(self.run_folder.users.path)
        store.put(UserRecord(user, Tier.GROUPS, embeddings[at]) for at, user in enumerate(users))
        store.close()

    def _save_encoder(self, model: ProperModel, users: Sequence[str], embeddings: Tensor, sample: SampledRows) -> None:
        if not self.config.groups.user_encoder:
            return
        starts = first_embeddings(self.config.groups, len(users), model.embedding_size, self.seed)
        found = train_encoder(model, self.encoder, sample, TrainedEmbeddings(users, starts, embeddings), self.seed)
        if found is not None:
            save_encoder(self.run_folder.encoder, found)

    def _users(self, model: ProperModel, fitting: FitAdapters | None) -> None:
        if self._is_done(Stage.USERS, wanted=True):
            return
        if not self.accelerator.is_main_process:
            # The main process fits the users; the others wait for it at the barrier after it has recorded the stage.
            self.accelerator.wait_for_everyone()
            return
        model.add_lora_router(self.config.users)
        store = AdapterStore(self.run_folder.users.path)
        stage = self._user_stage(model, store, fitting)
        with self._recorded(Stage.USERS, {"users": len(stage.users)}) as metadata:
            train_bases(stage, self.run_folder.users.bases)
            store.bind(bases_digest(self.run_folder.users.bases))
            trained = train_users(replace(stage, starts=train_start(stage, self.run_folder.users.start)))
            metadata["choice"] = asdict(trained.choice)
            save_tensors(self.run_folder.users.router, trained.router, {})
        shutil.rmtree(stage.folder, ignore_errors=True)
        store.close()

    def _user_stage(self, model: ProperModel, store: AdapterStore, fitting: FitAdapters | None) -> UserStage:
        """Return the inputs of stage 3, with the embeddings of stage 2; bind the store to backbone and groups."""
        # Adapters fit only these group experts: after retraining in place, the hash differs and the store refuses.
        groups = hash_file(self.run_folder.experts)
        store.bind({"backbone": self.backbone.digest, "groups": groups, **self.config.users.adapter_shape})
        users = [user.id for user in self.dataset.users("target") if user.history > 0]
        embeddings = torch.zeros(len(users), model.embedding_size)
        for at, user in enumerate(users):
            head = store.head(user)
            if head is None:
                raise RunFolderError(
                    f"{store.folder}: the store lacks target users; delete {self.folder} and run again"
                )
            embeddings[at] = head.embedding
        return UserStage(
            model=model,
            config=self.config.users,
            dataset=self.dataset,
            encoder=self.personal,
            users=users,
            embeddings=embeddings,
            store=store,
            folder=self.run_folder.users.work,
            seed=self.seed,
            checkpoint_seconds=self.config.compute.checkpoint_seconds,
            log=self.log,
            fitting=fitting,
        )

    def _plan(self, stage: SharedStage, sample: SampledRows) -> TrainingPlan:
        encoder = self.rows if stage == "population" else self.personal
        private = self.guarantee.settings if self.guarantee is not None else None
        return stage_plan(stage, self.config, sample, self.backbone, encoder, self.folder, self.seed, self.log, private)

    def _is_done(self, stage: Stage, wanted: bool) -> bool:
        if self.run_folder.is_trained(stage):
            return True
        if not wanted:
            raise RunFolderError(f"{self.folder}: stage '{stage}' is not trained yet; add it to --stages")
        return False

    def _require_untrained(self, stage: Stage, lost: str) -> None:
        """Raise RunFolderError if a stage is trained, although what it was trained on has to be trained anew."""
        if self.run_folder.is_trained(stage):
            raise RunFolderError(
                f"{self.folder / stage}: was trained on {lost}; delete it too, and run again to train both"
            )

    @contextmanager
    def _recorded(self, stage: Stage, sizes: Mapping[str, int]) -> Iterator[dict[str, Any]]:
        """Write `stage.json` after the block, which trains the stage and may add to the metadata that this yields."""
        started, metadata = time.perf_counter(), dict[str, Any](sizes)
        yield metadata
        give_back_memory()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            seconds = round(time.perf_counter() - started, 3)
            metadata |= {"seed": self.seed, "seconds": seconds, "backbone": self.backbone.digest}
            if stage != Stage.USERS and self.guarantee is not None:
                metadata["privacy"] = self.guarantee.metadata()
            write_json(self.run_folder.marker(stage), metadata)
            self.run_folder.checkpoint(stage).unlink(missing_ok=True)
