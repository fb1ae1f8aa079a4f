"""Parses layouts (how ranks divide a training step) such as `ep=4,data=sharded`, applies them to a config, and chooses
which ones to try by default."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import combinations, product
from typing import Any

from expert_parallel.parallel.degrees import ParallelDegrees
from expert_parallel.training.config import Config
from expert_parallel.training.setup import check_degrees

DEGREES = ("cp", "tp", "pp", "ep", "etp")
# Names in a layout -> settings of the config.
SETTINGS = {
    **{degree: f"parallel.{degree}" for degree in DEGREES},
    "data": "parallel.data.kind",
    "shards": "parallel.data.shards",
    "pipeline": "parallel.pipeline.kind",
    "micro_steps": "training.micro_steps",
    "recompute": "training.recompute",
}


@dataclass(frozen=True)
class Layout:
    """Holds how a training step is divided over the ranks, as (name, value) pairs with names from `SETTINGS`. Degrees
    that are not named are 1, weights are replicated (with `shards`, sharded over that many ranks), and everything else
    is as in the config."""

    settings: tuple[tuple[str, str | int], ...]

    @property
    def name(self) -> str:
        """Returns the layout as text that `parse` accepts, without pairs that have their default value."""
        named = [f"{name}={value}" for name, value in self.settings if not _is_default(name, value)]
        return ",".join(named or [f"{name}={value}" for name, value in self.settings])

    @staticmethod
    def parse(text: str) -> "Layout":
        """Parses `name=value,...`. Raises ValueError for text in another form or unknown names."""
        settings: dict[str, str | int] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            if not equals or not value:
                raise ValueError(f"--layout {text}: {part!r} is not of the form name=value")
            if name not in SETTINGS:
                raise ValueError(f"--layout {text}: {name!r} is none of {', '.join(SETTINGS)}")
            if name in settings:
                raise ValueError(f"--layout {text}: {name} is given twice")
            settings[name] = int(value) if value.isdecimal() else value
        return Layout(tuple(settings.items()))

    def apply(self, config: Config) -> Config:
        """Returns the config with this layout. Keeps the number of sequences in a micro-step, so global_batch follows
        micro_steps. Raises ValueError if config and layout do not fit together."""
        tree = config.model_dump(mode="json")
        named = dict(self.settings)
        values = dict.fromkeys(DEGREES, 1) | {"data": "sharded" if "shards" in named else "replicated"} | named
        for name, value in values.items():
            block, leaf = _find_setting(tree, name)
            if leaf == "kind" and block["kind"] != value:  # settings of the old kind do not apply to another
                block.clear()
            block[leaf] = value
        training = tree["training"]
        training["global_batch"] = config.training.global_batch // config.training.micro_steps * training["micro_steps"]
        moe = tree["model"]["moe"]
        if moe is not None and moe["dispatcher"]["kind"] == "local" and values["ep"] != 1:
            moe["dispatcher"] = {"kind": "all_to_all"}
        return Config.model_validate(tree, context={"where": ""})


def _find_setting(tree: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """Returns the block of a config's tree that holds a setting, and the setting's key in it."""
    *blocks, leaf = SETTINGS[name].split(".")
    for block in blocks:
        tree = tree[block]
    return tree, leaf


def _is_default(name: str, value: str | int) -> bool:
    return value in ("replicated", "1f1b") or (name in DEGREES and value == 1)


def check_layout(config: Config, layout: Layout, num_ranks: int) -> ParallelDegrees:
    """Returns the parallel degrees of the config in this layout. Raises ValueError, with the layout's name, if training
    does not support it."""
    try:
        return check_degrees(layout.apply(config), num_ranks)
    except ValueError as error:
        raise ValueError(f"layout {layout.name}: {error}") from None


def config_layout(tree: dict[str, Any]) -> Layout:
    """Returns the layout that a config's tree of settings describes."""
    blocks = {name: _find_setting(tree, name) for name in SETTINGS}
    found = {name: block.get(leaf) for name, (block, leaf) in blocks.items()}
    return Layout(tuple((name, value) for name, value in found.items() if value is not None))


def choose_layouts(config: Config, own: Layout, num_ranks: int, micro_steps: Sequence[int]) -> list[Layout]:
    """Chooses the config's own layout, if it fits the ranks, and a small set of others that together contain every pair
    of (name, value) settings at least once (pairwise testing). Greedily adds the layout with the most missing pairs."""
    candidates = [(layout, _pairs(layout)) for layout in _candidates(num_ranks, micro_steps)]
    missing = set().union(*(pairs for _, pairs in candidates))
    chosen = [own] if _fits(config, own, num_ranks) else []
    missing -= _pairs(own) if chosen else set()
    # Lazy greedy: the number of missing pairs that a layout covers only decreases, so recount only the current best.
    best = [(-len(pairs), number) for number, (_, pairs) in enumerate(candidates)]
    heapify(best)
    while best and missing:
        _, number = heappop(best)
        layout, pairs = candidates[number]
        added = len(missing & pairs)
        if best and added < -best[0][0]:
            heappush(best, (-added, number))
        elif added and _fits(config, layout, num_ranks):
            chosen.append(layout)
            missing -= pairs
    return chosen


def covering_layouts(layouts: Sequence[Layout], num_ranks: int) -> list[Layout]:
    """Chooses at most 4 of the layouts, and at least 2 if there are as many, that together use each axis that any of
    them uses: greedily, each time the one that adds most."""
    chosen: list[Layout] = []
    rest, missing = list(layouts), set().union(*(_axes(layout, num_ranks) for layout in layouts))
    while rest and len(chosen) < 4 and (missing or len(chosen) < 2):
        best = max(rest, key=lambda layout: len(_axes(layout, num_ranks) & missing))
        chosen.append(best)
        rest.remove(best)
        missing -= _axes(best, num_ranks)
    return chosen


def _axes(layout: Layout, num_ranks: int) -> set[str]:
    """Returns the parallel axes of more than one rank, and the kinds of data and pipeline parallelism."""
    named = dict(layout.settings)
    given = ParallelDegrees(num_ranks, **{degree: int(named.get(degree, 1)) for degree in DEGREES})  # type: ignore[arg-type]
    axes = {axis for axis in ("dp", "edp", *DEGREES) if getattr(given, axis) > 1}
    kinds = {"sharded" if "shards" in named else str(named.get("data", "replicated"))}
    return axes | kinds | ({str(named.get("pipeline", "1f1b"))} if given.pp > 1 else set())


def _candidates(num_ranks: int, micro_steps: Sequence[int]) -> Iterator[Layout]:
    divisors = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
    for degrees in product(divisors, repeat=len(DEGREES)):
        named = dict(zip(DEGREES, degrees, strict=True))
        try:
            ParallelDegrees(num_ranks, *degrees)  # type: ignore[arg-type]
        except ValueError:
            continue
        others: dict[str, Sequence[str | int]] = {
            "data": ("replicated", "sharded"),
            "pipeline": ("1f1b", "interleaved") if named["pp"] > 1 else ("1f1b",),
            "micro_steps": micro_steps if micro_steps[0] == 1 else [_fewest(micro_steps, named["pp"])],
            "recompute": ("none", "moe", "block"),
        }
        for values in product(*others.values()):
            yield Layout((*named.items(), *zip(others, values, strict=True)))


def _fewest(micro_steps: Sequence[int], pp: int) -> int:
    """Returns the fewest micro-steps that keep all pipeline stages busy, to save time."""
    return min((number for number in micro_steps if number >= pp), default=micro_steps[-1])


def _pairs(layout: Layout) -> set[tuple[Any, ...]]:
    return set(combinations(layout.settings, 2))


def _fits(config: Config, layout: Layout, num_ranks: int) -> bool:
    try:
        check_layout(config, layout, num_ranks)
    except ValueError:
        return False
    return True


def micro_step_counts(num_ranks: int, quick: bool = True) -> tuple[int, int]:
    """Returns the two numbers of micro-steps to try: 1, and one large enough to keep several pipeline stages busy; or,
    if not quick, 2, so that gradients accumulate, and the larger one for more stages."""
    return (1, max(2, min(num_ranks, 4))) if quick else (2, max(3, min(num_ranks, 4)))
