"""Defines rules for models whose blocks are of two kinds: some with a sliding window, the others without."""

from collections.abc import Callable
from dataclasses import dataclass

from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree, short
from expert_parallel.interop.rope import PARTIAL, Rope
from expert_parallel.interop.rules import FULL, WINDOWED, get_setting, layer_types, read_layer_types, set_setting


@dataclass(frozen=True)
class LayerTypes:
    """Limits attention to the last `sliding_window` positions in the blocks that layer_types lists as
    sliding_attention.

    size: the default of sliding_window. usual: returns the default of layer_types, True for each block with a window,
    given a config.json and the number of blocks.
    """

    size: int
    usual: Callable[[HuggingFaceConfig, int], list[bool]]

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        is_null = theirs.take("sliding_window", default=self.size) is None
        size = None if is_null else theirs.size("sliding_window", default=self.size)
        read_layer_types(theirs, ours, self.usual(theirs, ours["num_layers"]), size)

    def write(self, ours: Tree, theirs: Tree) -> None:
        theirs |= {"sliding_window": get_setting(ours, "attention.window"), "layer_types": layer_types(ours)}


@dataclass(frozen=True)
class RopeByKind:
    """Translates rotary positions that differ between blocks with and without a window: rope_parameters holds an object
    for each kind of block. Comes after the rules of heads and windows.

    thetas: the bases of full and of windowed blocks, if rope_parameters is absent. keys: of the bases, in the form that
    some models have instead of rope_parameters; both forms are written. partial: as in `Rope`.
    """

    thetas: tuple[float, float]
    keys: tuple[str, str] | None = None
    partial: float | None = None

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        forms = self._forms(theirs)
        kind_of_blocks = {None: (FULL,), "all": (WINDOWED,)}
        kinds = kind_of_blocks.get(get_setting(ours, "window_blocks.kind"), (FULL, WINDOWED))
        found = {kind: self._read_one(theirs, ours, forms, kind) for kind in kinds}
        sizes = {get_setting(one, "attention.rope_size") for one in found.values()}
        if len(sizes) > 1:
            raise theirs.refuse("rope_parameters", f"{PARTIAL} must be the same in all blocks")
        first = found[kinds[0]]
        set_setting(ours, "position", first["position"])
        if sizes != {None}:
            set_setting(ours, "attention.rope_size", sizes.pop())
        if found[kinds[-1]]["position"] != first["position"]:
            set_setting(ours, "window_overrides.position", found[kinds[-1]]["position"])

    def _forms(self, theirs: HuggingFaceConfig) -> Tree:
        """Returns the parameters of each kind of block. Raises a ValueError if they are in two places and differ."""
        given = theirs.take("rope_parameters", default=None)
        if given is not None and not (isinstance(given, dict) and all(isinstance(v, dict) for v in given.values())):
            raise theirs.refuse("rope_parameters", f"it must have an object for {FULL} and one for {WINDOWED}")
        forms = dict(zip((FULL, WINDOWED), ({"rope_theta": theta} for theta in self.thetas), strict=True))
        if self.keys is not None:
            scaling = theirs.take("rope_scaling", default=None)
            if scaling is not None and scaling not in ({"type": "default"}, {"rope_type": "default"}):
                raise theirs.refuse("rope_scaling", "only null is supported in this family")
            for kind, key in zip((FULL, WINDOWED), self.keys, strict=True):
                beside = {"rope_theta": theirs.take(key, default=None), PARTIAL: theirs.take(PARTIAL, default=None)}
                forms[kind] |= {name: value for name, value in beside.items() if value is not None}
                for name, value in beside.items():
                    if given is not None and value is not None and given.get(kind, {}).get(name, value) != value:
                        raise ValueError(
                            f"config.json: {name} of {kind} is {short(value)} in one place and "
                            f"{short(given[kind][name])} in another (rope_parameters, {key}, {PARTIAL})"
                        )
        return forms if given is None else given

    def _read_one(self, theirs: HuggingFaceConfig, ours: Tree, forms: Tree, kind: str) -> Tree:
        """Returns the settings that a model would have whose blocks are all of one kind."""
        if kind not in forms:
            raise theirs.refuse("rope_parameters", f"it lacks {kind}, which layer_types has")
        values = {key: theirs.values[key] for key in ("max_position_embeddings",) if key in theirs.values}
        found: Tree = {"attention": {"head_size": get_setting(ours, "attention.head_size")}}
        rule = Rope(default_theta=self.thetas[kind == WINDOWED], partial=self.partial)
        rule.read(HuggingFaceConfig({**values, "rope_parameters": forms[kind]}), found)
        return found

    def write(self, ours: Tree, theirs: Tree) -> None:
        kinds = set(layer_types(ours))
        positions = {FULL: ours["position"], WINDOWED: get_setting(ours, "window_overrides.position")}
        forms: Tree = {}
        for kind in (FULL, WINDOWED):
            written: Tree = {}
            position = positions[kind] or ours["position"]
            Rope(partial=self.partial).write({"attention": ours["attention"], "position": position}, written)
            if kind in kinds:
                forms[kind] = written["rope_parameters"]
            if self.keys is not None:
                key = self.keys[kind == WINDOWED]
                theirs |= {key: written.get("rope_theta"), PARTIAL: written.get(PARTIAL)}
        theirs["rope_parameters"] = forms
