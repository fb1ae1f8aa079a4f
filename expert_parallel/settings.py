"""The base class of every config class: strict types, unknown keys refused, frozen after validation."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A block of the YAML file. Each component declares its own subclass beside its code.

    Strict: `"8"` is not `8`. Unknown keys are errors. Instances never change after validation, so a
    value that was checked at start is the value that runs. Infinities and NaN are no settings.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
