"""Training functions of variants: each trains the requested stages into the variant's folder."""

from __future__ import annotations

from proper.data.derived.views import Leaking, OneUser
from proper.methods.end_to_end import JointRunner
from proper.methods.per_user_lora import DirectRunner
from proper.methods.poly_training import PolyRunner
from proper.methods.spec import TrainingWork
from proper.training.stages import StageRunner


def ladder(work: TrainingWork) -> None:
    """Train the stages as the main run does."""
    place = work.place
    StageRunner(place.config, place.dataset, place.folder, place.seed, work.log).run(work.stages)


def one_user(work: TrainingWork) -> None:
    """Train the stages with all rows attributed to one user: the same rows in the same order, one embedding."""
    place = work.place
    StageRunner(place.config, OneUser(place.dataset), place.folder, place.seed, work.log).run(work.stages)


def direct(work: TrainingWork) -> None:
    """Train user adapters on the backbone or population, without groups."""
    place = work.place
    DirectRunner(place.config, place.dataset, place.folder, place.seed, work.log).run()


def leaking(work: TrainingWork) -> None:
    """Train as `direct`, with the leak of OPPU's released code: each user also trains on all preceding users' rows."""
    place = work.place
    data = Leaking(place.dataset, place.config.users.max_items)
    DirectRunner(place.config, data, place.folder, place.seed, work.log).run()


def poly(work: TrainingWork) -> None:
    """Train PEFT's Poly in place of stage 2."""
    place = work.place
    PolyRunner(place.config, place.dataset, place.folder, place.seed, work.log).run()


def joint(work: TrainingWork) -> None:
    """Train experts and user adapters jointly on the backbone."""
    place = work.place
    JointRunner(place.config, place.dataset, place.folder, place.seed, work.log).run()
