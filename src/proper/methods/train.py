"""Ways of training a variant: the ladder's, or a special one. Each leaves the stages that were asked for in its folder.

Knows nothing about which method wants it.
"""

from __future__ import annotations

from proper.data.views import Leaking, OneUser
from proper.methods.method import Work
from proper.training.direct import DirectRunner
from proper.training.joint import JointRunner
from proper.training.poly import PolyRunner
from proper.training.stages import StageRunner


def ladder(work: Work) -> None:
    """Train the stages as the main job does."""
    place = work.place
    StageRunner(place.config, place.dataset, place.folder, place.seed, work.log).run(work.stages)


def one_user(work: Work) -> None:
    """Train the stages with everybody's rows as one user's: the same rows in the same order, one embedding."""
    place = work.place
    StageRunner(place.config, OneUser(place.dataset), place.folder, place.seed, work.log).run(work.stages)


def direct(work: Work) -> None:
    """Train users' adapters on what is below, without groups."""
    place = work.place
    DirectRunner(place.config, place.dataset, place.folder, place.seed, work.log).run()


def leaking(work: Work) -> None:
    """The same with OPPU's released fault: every user is trained on the users before them, too."""
    place = work.place
    data = Leaking(place.dataset, place.config.users.max_items)
    DirectRunner(place.config, data, place.folder, place.seed, work.log).run()


def poly(work: Work) -> None:
    """Train PEFT's Poly in place of stage 2."""
    place = work.place
    PolyRunner(place.config, place.dataset, place.folder, place.seed, work.log).run()


def joint(work: Work) -> None:
    """Train experts and users' adapters together, from the backbone."""
    place = work.place
    JointRunner(place.config, place.dataset, place.folder, place.seed, work.log).run()
