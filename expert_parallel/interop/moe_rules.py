"""Defines rules for the experts of a config.json that families with DeepSeek's router share."""

from dataclasses import dataclass
from typing import Any

from expert_parallel.interop.hf_config import REQUIRED, HuggingFaceConfig, Tree
from expert_parallel.interop.rules import get_setting, set_setting


@dataclass(frozen=True)
class GroupLimit:
    """Translates group-limited routing: a token's experts come from topk_group of n_group groups of experts.

    A single group is no limit. default: the default of both keys.
    """

    default: Any = REQUIRED

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        count, limit = (theirs.size(key, default=self.default) for key in ("n_group", "topk_group"))
        if limit > count:
            raise theirs.refuse("topk_group", f"it must be at most n_group ({count})")
        if count > 1:
            set_setting(ours, "moe.router.group_limit", {"count": count, "limit": limit, "score": "top2_sum"})

    def write(self, ours: Tree, theirs: Tree) -> None:
        groups = get_setting(ours, "moe.router.group_limit") or {"count": 1, "limit": 1}
        theirs |= {"n_group": groups["count"], "topk_group": groups["limit"]}


@dataclass(frozen=True)
class SharedExperts:
    """Translates a number of shared experts to one network with their total hidden size.

    key: the number's key. least: the least number that the family allows.
    """

    key: str = "n_shared_experts"
    least: int = 1

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        if hidden := theirs.size(self.key, least=self.least) * get_setting(ours, "moe.experts.hidden"):
            set_setting(ours, "moe.shared_experts", {"hidden": hidden, "activation": "swiglu"})

    def write(self, ours: Tree, theirs: Tree) -> None:
        shared, each = get_setting(ours, "moe.shared_experts.hidden") or 0, get_setting(ours, "moe.experts.hidden") or 1
        theirs[self.key] = shared // each


@dataclass(frozen=True)
class MLPLayerTypes:
    """Places MoE blocks where mlp_layer_types lists `sparse`, not `dense`; without the list, in all blocks but the
    first.

    Some folders have first_k_dense_replace, too, which transformers does not read there: it must agree. reads_first:
    True if transformers reads it where the list is absent.
    """

    reads_first: bool = False

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        count = ours["num_layers"]
        kinds = theirs.take("mlp_layer_types", default=None)
        if kinds is None:
            dense = theirs.size("first_k_dense_replace", default=1, least=0, most=count) if self.reads_first else 1
            kinds = [*["dense"] * dense, *["sparse"] * (count - dense)]
        if not isinstance(kinds, list) or len(kinds) != count or any(kind not in ("dense", "sparse") for kind in kinds):
            raise theirs.refuse("mlp_layer_types", f"it must list {count} of dense or sparse")
        blocks = [layer for layer, kind in enumerate(kinds) if kind == "sparse"]
        k = count - len(blocks)
        is_last = blocks == list(range(k, count))
        first = theirs.size("first_k_dense_replace", default=None, least=0)
        if first is not None and not (is_last and first == k):
            raise theirs.refuse("first_k_dense_replace", f"mlp_layer_types makes other blocks dense ({k} of {count})")
        if k == 0:
            set_setting(ours, "moe_blocks", {"kind": "all"})
        elif is_last:
            set_setting(ours, "moe_blocks", {"kind": "all_but_first", "k": k})
        else:
            set_setting(ours, "moe_blocks", {"kind": "list", "indices": blocks})

    def write(self, ours: Tree, theirs: Tree) -> None:
        blocks = set(ours["moe_layers"])
        theirs["mlp_layer_types"] = ["sparse" if layer in blocks else "dense" for layer in range(ours["num_layers"])]
