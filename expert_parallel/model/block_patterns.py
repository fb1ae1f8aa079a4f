"""Defines the settings that select transformer blocks by their numbers."""

from typing import Annotated, Literal

from pydantic import Field

from expert_parallel.settings import Settings


class AllBlocks(Settings):
    """Selects all transformer blocks."""

    kind: Literal["all"] = "all"

    def blocks(self, num_layers: int) -> list[int]:
        return list(range(num_layers))


class EveryNth(Settings):
    """Selects blocks n - 1, 2n - 1, ...: with n = 2 every other block, starting with the second (Switch, GLaM)."""

    kind: Literal["every_nth"]
    n: int = Field(ge=1)
    """Sets the distance between two selected blocks."""

    def blocks(self, num_layers: int) -> list[int]:
        return list(range(self.n - 1, num_layers, self.n))


class AllButFirst(Settings):
    """Selects all blocks but the first k (DeepSeek-V3, whose first blocks are dense)."""

    kind: Literal["all_but_first"]
    k: int = Field(ge=0)
    """Sets the number of blocks at the start of the model that are not selected."""

    def blocks(self, num_layers: int) -> list[int]:
        return list(range(self.k, num_layers))


class ListedBlocks(Settings):
    """Selects the blocks with the listed numbers."""

    kind: Literal["list"]
    indices: list[int]
    """Lists the numbers of the selected blocks, counted from 0."""

    def blocks(self, num_layers: int) -> list[int]:
        return sorted(self.indices)


Blocks = Annotated[AllBlocks | EveryNth | AllButFirst | ListedBlocks, Field(discriminator="kind")]


def check_blocks(name: str, pattern: Blocks, num_layers: int, what: str) -> None:
    """Raises a ValueError unless the pattern selects existing blocks, each once. what: the setting for them."""
    blocks = pattern.blocks(num_layers)
    if len(set(blocks)) < len(blocks):
        raise ValueError(f"{name}.indices names a block twice: {blocks}")
    outside = [block for block in blocks if not 0 <= block < num_layers]
    if outside:
        raise ValueError(f"{name} names block {outside[0]}, but num_layers is {num_layers}")
    if not blocks:
        raise ValueError(f"{what} is given, but {name} selects none of the {num_layers} blocks")
