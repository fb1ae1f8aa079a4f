"""Defines the settings in which blocks with a window differ from the other blocks."""

from typing import Annotated

from pydantic import Field

from expert_parallel.model.attention import HeadsConfig
from expert_parallel.model.rotary import RopeConfig
from expert_parallel.settings import Settings


class WindowOverrides(Settings):
    """Gives the blocks that `window_blocks` selects other positions, key heads or sinks than the other blocks have
    (Gemma 3, MiMo-V2); null leaves a setting as it is there."""

    position: RopeConfig | None = None
    """Replaces `position`, which must be rotary."""
    num_kv_heads: Annotated[int, Field(ge=1)] | None = None
    """Replaces `attention.num_kv_heads`; it must divide `attention.num_heads`."""
    sinks: bool | None = None
    """Replaces `attention.sinks`."""

    def apply(self, attention: HeadsConfig) -> HeadsConfig:
        """Returns the settings of a block with a window. attention: those of the other blocks."""
        given = {"num_kv_heads": self.num_kv_heads, "sinks": self.sinks}
        return attention.model_copy(update={name: value for name, value in given.items() if value is not None})

    def check(self, attention: Settings, num_layers: int, window_layers: list[int], rope_layers: list[int]) -> None:
        """Raises a ValueError unless the settings have an effect and fit together with the others of the model.

        attention: its attention settings, of any kind. window_layers, rope_layers: the numbers of the blocks with a
        window, and of those with rotary positions.
        """
        if self == WindowOverrides():
            raise ValueError("window_overrides sets nothing: give position, num_kv_heads or sinks, or make it null")
        if not isinstance(attention, HeadsConfig) or not 0 < len(window_layers) < num_layers:
            raise ValueError(
                f"window_overrides is given, but {len(window_layers)} of the {num_layers} blocks have a window: some "
                "must have one, and others not (attention.window or attention.chunk, window_blocks)"
            )
        if attention.num_heads % (self.num_kv_heads or 1):
            raise ValueError(
                f"attention.num_heads ({attention.num_heads}) is not a multiple of window_overrides.num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if self.position is not None:
            self.position.refuse("window_overrides.position", *attention.rope_columns)
        if self.position is not None and not set(window_layers).intersection(rope_layers):
            raise ValueError(
                "window_overrides.position is given, but no block with a window has rotary positions (position.kind, "
                "rope_blocks)"
            )
