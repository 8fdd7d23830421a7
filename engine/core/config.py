"""The base of every recipe section; each room defines its own sections beside what they configure.

A section is a frozen pydantic model that refuses unknown fields. `option` declares a field together
with its help text and unit, and says whether changing it changes results (and therefore the run's
identity) or may differ when a run is resumed.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """A section of a recipe: immutable, strict about unknown fields, documented field by field."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def differs(self, name: str) -> bool:
        """Whether field `name` has another value than its default."""
        return getattr(self, name) != type(self).model_fields[name].get_default()


def option(
    default: Any = ...,
    help: str = "",
    *,
    unit: str | None = None,
    affects_result: bool = True,
    **constraints: Any,
) -> Any:
    """A documented recipe field.

    Args:
        default: the default value; leave it out for a required field.
        help: one sentence shown by `--help` and in the JSON schema.
        unit: the unit of the value ("images", "steps", "minutes", "pixels"), shown beside the help.
        affects_result: False for fields that only change speed, logging or storage; such a field
            is left out of the run's identity and may change when the run is resumed.
        constraints: pydantic constraints such as `gt=0`, `le=1`.
    """
    extra = {"affects_result": affects_result} | ({"unit": unit} if unit else {})
    return Field(default, description=help, json_schema_extra=extra, **constraints)
