"""Ways of training a variant: the ladder's, or a special one. Each leaves the stages that were asked for in its folder.

Knows nothing about which method wants it.
"""

from __future__ import annotations

from proper.data.derived.views import Leaking, OneUser
from proper.methods.end_to_end import JointRunner
from proper.methods.per_user_lora import DirectRunner
from proper.methods.poly_training import PolyRunner
from proper.methods.spec import TrainingWork
from proper.training.stages import StageRunner


def ladder(work: TrainingWork) -> None:
    """Train the stages as the main job does."""
    place = work.place
    StageRunner(place.config, place.dataset, place.folder, place.seed, work.log).run(work.stages)


def one_user(work: TrainingWork) -> None:
    """Train the stages with everybody's rows as one user's: the same rows in the same order, one embedding."""
    place = work.place
    StageRunner(place.config, OneUser(place.dataset), place.folder, place.seed, work.log).run(work.stages)


def direct(work: TrainingWork) -> None:
    """Train users' adapters on what is below, without groups."""
    place = work.place
    DirectRunner(place.config, place.dataset, place.folder, place.seed, work.log).run()


def leaking(work: TrainingWork) -> None:
    """The same with OPPU's released fault: every user is trained on the users before them, too."""
    place = work.place
    data = Leaking(place.dataset, place.config.users.max_items)
    DirectRunner(place.config, data, place.folder, place.seed, work.log).run()


def poly(work: TrainingWork) -> None:
    """Train PEFT's Poly in place of stage 2."""
    place = work.place
    PolyRunner(place.config, place.dataset, place.folder, place.seed, work.log).run()


def joint(work: TrainingWork) -> None:
    """Train experts and users' adapters together, from the backbone."""
    place = work.place
    JointRunner(place.config, place.dataset, place.folder, place.seed, work.log).run()
