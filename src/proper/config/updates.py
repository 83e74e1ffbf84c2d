"""Settings of what follows training: updates of users with new interactions, and the drift that calls for them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from proper.config.section import Count, Fraction, Positive, Section


class UpdateConfig(Section):
    """Update of a user: training continues from the version in service, with new interactions.

    Attributes:
        replay: share of an update's training rows that are sampled from earlier interactions; the others are new.
        distance: weight of the penalty on the distance to the version in service, the squared distance of the products
            B A of all modules, relative to the squared size of that version's.
        steps: optimizer steps of an update, rounded up to whole passes over its rows.
        past: weight of the loss on earlier interactions in the promotion: an update must lower the loss on held-out new
            interactions by more than this times the increase of the loss on held-out earlier ones.
        outlier: a new interaction is left out if its loss under the group model of an unknown user is more than this
            many standard deviations above that of the user's earlier interactions, as for answers that do not fit
            their inputs; null keeps all.
        when: whether the fit queue updates a user after every new interaction, or once the user has drifted.
    """

    replay: Fraction = 0.5
    distance: Annotated[float, Field(ge=0)] = 0.1
    steps: Count = 20
    past: Annotated[float, Field(ge=0)] = 1.0
    outlier: Positive | None = 4.0
    when: Literal["always", "drifted"] = "always"


class DriftConfig(Section):
    """When a user counts as drifted: a one-sided CUSUM of the new interactions' losses under the version in service.

    Attributes:
        allowance: excess of a loss over the user's usual one, in standard deviations, that does not count.
        threshold: sum of the excess, in standard deviations, at which the user counts as drifted.
    """

    allowance: Annotated[float, Field(ge=0)] = 0.5
    threshold: Positive = 4.0
