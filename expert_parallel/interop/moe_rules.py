"""Defines rules for the experts of a config.json that families with DeepSeek's router share."""

from dataclasses import dataclass
from typing import Any

from expert_parallel.interop.hf_config import REQUIRED, HuggingFaceConfig, Tree
from expert_parallel.interop.rules import get_setting, set_setting


@dataclass(frozen=True)
class GroupLimit:
    """Translates group-limited routing: a token's experts come from topk_group of n_group groups of experts.

    A single group is no limit. default: the default of both keys. score: how a group is scored, see GroupLimitConfig.
    """

    default: Any = REQUIRED
    score: str = "top2_sum"

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        count, limit = (theirs.size(key, default=self.default) for key in ("n_group", "topk_group"))
        if limit > count:
            raise theirs.refuse("topk_group", f"it must be at most n_group ({count})")
        if count > 1:
            set_setting(ours, "moe.router.group_limit", {"count": count, "limit": limit, "score": self.score})

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
    first `dense`.

    Some folders have first_k_dense_replace, too. reads_first: True if transformers reads it where there is no list, and
    else ignores it; False: it must agree. flags: an older key, which lists 1 or true for MoE blocks, and must agree.
    """

    dense: int = 1
    reads_first: bool = False
    flags: str | None = None

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        count = ours["num_layers"]
        first = theirs.size("first_k_dense_replace", default=None, least=0)
        kinds, flagged = theirs.take("mlp_layer_types", default=None), self._flagged(theirs, count)
        if kinds is None:
            dense = min(count, first if self.reads_first and first is not None else self.dense)
            kinds = flagged or ["dense"] * dense + ["sparse"] * (count - dense)
        if not isinstance(kinds, list) or len(kinds) != count or any(kind not in ("dense", "sparse") for kind in kinds):
            raise theirs.refuse("mlp_layer_types", f"it must list {count} of dense or sparse")
        if self.flags is not None and flagged not in (None, kinds):
            raise theirs.refuse(self.flags, "it must agree with mlp_layer_types")
        blocks = [layer for layer, kind in enumerate(kinds) if kind == "sparse"]
        k = count - len(blocks)
        is_last = blocks == list(range(k, count))
        if first is not None and not self.reads_first and not (is_last and first == k):
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
        if self.flags is not None:
            theirs[self.flags] = [int(layer in blocks) for layer in range(ours["num_layers"])]

    def _flagged(self, theirs: HuggingFaceConfig, count: int) -> list[str] | None:
        """Returns what the older key says, as mlp_layer_types would."""
        flags = None if self.flags is None else theirs.take(self.flags, default=None)
        if self.flags is None or flags is None:
            return None
        if not isinstance(flags, list) or len(flags) != count or any(flag not in (0, 1) for flag in flags):
            raise theirs.refuse(self.flags, f"it must list {count} of 0 (dense) or 1 (experts)")
        return ["sparse" if flag else "dense" for flag in flags]
