"""What all sections of a configuration share."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """What all sections share: unknown keys refused, no silent conversion of types, no change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def defaults(cls) -> Self:
        """The section that is meant if none is written."""
        return cls.model_validate({})
