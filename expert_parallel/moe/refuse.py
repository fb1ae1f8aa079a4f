"""Combinations of a MoE layer's settings that cannot work, or of which one would do nothing, each with its reason."""

from expert_parallel.moe.balance import LossConfig, loss_name
from expert_parallel.moe.capacity import CapacityConfig, DroplessConfig
from expert_parallel.moe.routing import HashConfig, LinearSettings, RouterSettings, TopKRouterConfig


def refuse_combinations(
    router: RouterSettings, capacity: CapacityConfig, losses: list[LossConfig], num_experts: int
) -> None:
    """ValueError in one sentence that names the settings and their numbers."""
    names = [loss_name(loss) for loss in losses]
    if len(set(names)) < len(names):
        raise ValueError(f"losses: each kind and scope may stand once, found {', '.join(names)}")
    if router.kind == "hash" and losses:
        raise ValueError(f"losses: {names[0]} would do nothing: router.kind is 'hash', which learns nothing")
    if router.kind == "expert_choice" and any(loss.kind == "balance" for loss in losses):
        raise ValueError(
            "losses: balance would do nothing: router.kind is 'expert_choice', which is balanced by itself"
        )
    if isinstance(capacity, DroplessConfig):
        return
    if router.kind == "expert_choice":
        raise ValueError(
            f"capacity.kind is {capacity.kind!r} but router.kind is 'expert_choice', whose experts take no more than "
            "router.train (router.eval) says: set capacity.kind to 'dropless'"
        )
    normalises = isinstance(router, HashConfig) or (isinstance(router, LinearSettings) and router.normalise)
    if capacity.renormalise and not normalises:
        raise ValueError(
            "capacity.renormalise is true but router.normalise is false: weights that were never normalised have no "
            "sum to keep"
        )
    choices = router.num_choices(num_experts)
    if capacity.renormalise and choices == 1:
        raise ValueError("capacity.renormalise is true but router.k is 1: the only weight is 1 or nothing as it is")
    if capacity.overflow == "reroute":
        reachable = num_experts
        if isinstance(router, TopKRouterConfig) and router.group_limit is not None:
            reachable = num_experts // router.group_limit.count * router.group_limit.limit
        if choices >= reachable:
            raise ValueError(
                f"capacity.overflow is 'reroute' but router.k is {choices} of the {reachable} experts that a token may "
                "choose: there is no next best one"
            )
