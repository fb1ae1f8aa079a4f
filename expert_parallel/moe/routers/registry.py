"""Maps each `kind:` to its router, and defines the settings that choose one.

One line registers a router of your own:

ROUTERS["mine"] = MyRouter                                    # in Python, before the config is read

[project.entry-points."expert_parallel.routers"]              # or in the pyproject.toml of an installed package,
mine = "my_package.routers:MyRouter"                          # for the command line
"""

from importlib.metadata import entry_points
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from expert_parallel.moe.routers.across_tokens import (
    ExpertChoiceConfig,
    ExpertChoiceRouter,
    SinkhornConfig,
    SinkhornRouter,
)
from expert_parallel.moe.routers.base import (
    HashConfig,
    HashRouter,
    Router,
    RouterSettings,
    TopKRouter,
    TopKRouterConfig,
)
from expert_parallel.moe.routers.noisy import GShardConfig, GShardRouter, NoisyTopKConfig, NoisyTopKRouter
from expert_parallel.moe.routers.sparse_mixer import SparseMixerConfig, SparseMixerRouter

ROUTERS: dict[str, type[Router]] = {
    "top_k": TopKRouter,
    "noisy_top_k": NoisyTopKRouter,
    "gshard": GShardRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "sinkhorn": SinkhornRouter,
    "sparsemixer": SparseMixerRouter,
}
_OURS = tuple(ROUTERS)


class RegisteredRouterConfig(RouterSettings):
    """Uses a router of your own under the name that it is registered as; its own Config checks its settings."""

    model_config = ConfigDict(extra="allow")

    kind: str = Field(json_schema_extra={"not": {"enum": list(_OURS)}})  # or editors would accept any key for our kinds

    @model_validator(mode="after")
    def _check(self) -> "RegisteredRouterConfig":
        if self.kind not in ROUTERS:
            found = [point for point in entry_points(group="expert_parallel.routers") if point.name == self.kind]
            if not found:
                known = ", ".join(repr(kind) for kind in ROUTERS)
                raise ValueError(f"kind is {self.kind!r}, it must be one of {known}, or a registered router")
            ROUTERS[self.kind] = found[0].load()
        self.resolve()
        return self

    def resolve(self) -> RouterSettings:
        """Returns the router's own settings."""
        return ROUTERS[self.kind].Config.model_validate(self.model_dump(), context={"where": ""})

    def num_choices(self, num_experts: int) -> int:
        return self.resolve().num_choices(num_experts)

    def experts_per_token(self, num_experts: int) -> float:
        return self.resolve().experts_per_token(num_experts)

    def refuse(self, num_experts: int) -> None:
        self.resolve().refuse(num_experts)


def _tag(value: Any) -> str:
    kind = value.get("kind", "top_k") if isinstance(value, dict) else getattr(value, "kind", "top_k")
    return kind if kind in _OURS else "registered"


RouterConfig = Annotated[
    Annotated[TopKRouterConfig, Tag("top_k")]
    | Annotated[NoisyTopKConfig, Tag("noisy_top_k")]
    | Annotated[GShardConfig, Tag("gshard")]
    | Annotated[ExpertChoiceConfig, Tag("expert_choice")]
    | Annotated[HashConfig, Tag("hash")]
    | Annotated[SinkhornConfig, Tag("sinkhorn")]
    | Annotated[SparseMixerConfig, Tag("sparsemixer")]
    | Annotated[RegisteredRouterConfig, Tag("registered")],
    Discriminator(_tag),
]


def router_settings(config: RouterSettings) -> RouterSettings:
    """Returns the settings that the router gets: for a registered router those of its own class, with its defaults."""
    return config.resolve() if isinstance(config, RegisteredRouterConfig) else config


def build_router(config: RouterSettings, d_model: int, num_experts: int) -> Router:
    """Builds the router of these settings, with uninitialised weights."""
    return ROUTERS[config.kind](router_settings(config), d_model, num_experts)


def router_params(config: RouterSettings, d_model: int, num_experts: int) -> int:
    """Counts the parameters of a router by building it on the meta device, which takes no memory: the settings of a
    registered router do not tell its parameters."""
    with torch.device("meta"):
        router = build_router(config, d_model, num_experts)
    return sum(parameter.numel() for parameter in router.parameters())
