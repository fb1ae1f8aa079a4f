"""Maps experts to the ranks of the expert parallel group, without tensors or process groups."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class ExpertPlacement:
    """Maps each expert to the rank that holds it, and to its slot: its index among the experts of that rank.

    `rank_of_expert[i]` is the rank, 0 <= rank < num_ranks, that holds global expert i. The slots of a rank follow the
    order of global expert numbers.
    """

    rank_of_expert: tuple[int, ...]
    num_ranks: int

    def __post_init__(self) -> None:
        assert all(0 <= rank < self.num_ranks for rank in self.rank_of_expert), self

    @staticmethod
    def contiguous(num_experts: int, num_ranks: int) -> "ExpertPlacement":
        """Returns the default placement: consecutive experts share a rank, the first `num_experts % num_ranks` ranks
        hold one more. Raises ValueError if there are fewer experts than ranks.

        >>> ExpertPlacement.contiguous(5, 2).rank_of_expert
        (0, 0, 0, 1, 1)
        """
        if num_experts < num_ranks:
            raise ValueError(
                f"model.moe.num_experts ({num_experts}) is smaller than parallel.ep ({num_ranks}): "
                "each expert-parallel rank must hold at least one expert"
            )
        small, larger = divmod(num_experts, num_ranks)
        sizes = [small + (rank < larger) for rank in range(num_ranks)]
        return ExpertPlacement(tuple(rank for rank, size in enumerate(sizes) for _ in range(size)), num_ranks)

    @property
    def num_experts(self) -> int:
        """Returns the number of experts on all ranks."""
        return len(self.rank_of_expert)

    def experts_on(self, rank: int) -> tuple[int, ...]:
        """Returns the global numbers of the experts on `rank`, in slot order."""
        return self._experts_by_rank[rank]

    @cached_property
    def slot_of_expert(self) -> tuple[int, ...]:
        """Returns, for each global expert, its slot on its rank."""
        slots = [0] * self.num_experts
        for experts in self._experts_by_rank:
            for slot, expert in enumerate(experts):
                slots[expert] = slot
        return tuple(slots)

    @cached_property
    def _experts_by_rank(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(e for e, r in enumerate(self.rank_of_expert) if r == rank) for rank in range(self.num_ranks))
