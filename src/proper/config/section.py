"""Base of all sections of the config, as a pydantic model, and the types of their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all config sections: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and false for a number; pydantic would take them for 1 and 0 (`groups.layers: on`)."""
        kinds = {*_leaves(cls.model_fields[str(info.field_name)].annotation)}
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, bool) and kinds & {int, float} and bool not in kinds:
                raise ValueError(
                    f"should be a number, not {str(each).lower()} (as which YAML reads yes, no, on and off as well)"
                )
        return value


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation consists of."""
    yield annotation
    for part in get_args(annotation):
        yield from _leaves(part)
