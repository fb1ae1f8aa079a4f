"""The run's config: the rooms' config classes as one tree, YAML <-> that tree, dotted overrides. Only file that knows
YAML."""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import torch
import yaml
from pydantic import Field, ValidationError, model_validator

from expert_parallel.checkpoint.config import CheckpointConfig
from expert_parallel.data.config import DataConfig, StdlibData, TokensData
from expert_parallel.data.tokenizer import VOCABULARY_SIZE
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.generation import Sampling
from expert_parallel.model.rotary import LearnedPositionConfig
from expert_parallel.moe.capacity.limit import LimitSettings
from expert_parallel.moe.experts.grouped import takes_grouped_mm
from expert_parallel.nn.ffn import width_in
from expert_parallel.parallel.degrees import EXPERT_ORDER, InterleavedConfig, ParallelConfig, ShardedConfig
from expert_parallel.runtime.process import RuntimeConfig
from expert_parallel.settings import CONFIG_VERSION, Settings, refuse_newer
from expert_parallel.training.engines.config import refuse_engine
from expert_parallel.training.freeze import refuse_trainable
from expert_parallel.training.replay import PlayConfig
from expert_parallel.training.step import DTYPES, TrainingConfig

S = TypeVar("S", bound=Settings)


class EvaluationConfig(Settings):
    """Held-out loss every so many steps and at the end, over at most `sequences` sequences."""

    every: int = Field(default=100, ge=1)
    sequences: int = Field(default=64, ge=1)


class SampleConfig(Sampling):
    """A text generated at the end of the run."""

    prompt: str = Field(min_length=1)
    length: int = Field(default=200, ge=1)
    temperature: float = Field(default=0.7, ge=0)


class RunConfig(Settings):
    """Where the run's files go, and how often it speaks."""

    folder: str = Field(min_length=1)
    log_every: int = Field(default=10, ge=1)
    sample: SampleConfig | None = None


class Config(Settings):
    """A YAML file; its paths are attribute paths. version: of the settings' meaning; a file that has none is of 1."""

    version: int = Field(default=CONFIG_VERSION, ge=1)
    run: RunConfig
    seed: int = Field(default=0, ge=0)
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    data: DataConfig = StdlibData(kind="stdlib")
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="before")
    @classmethod
    def _refuse_newer(cls, tree: Any) -> Any:
        """Before all else: what a newer file says may not be known here."""
        version = tree.get("version") if isinstance(tree, dict) else None
        if isinstance(version, int):
            refuse_newer("version", version, CONFIG_VERSION)
        return tree

    @model_validator(mode="after")
    def _fit_together(self) -> "Config":
        model, training = self.model, self.training
        if not isinstance(self.data, TokensData) and model.vocab_size < VOCABULARY_SIZE:
            raise ValueError(
                f"model.vocab_size ({model.vocab_size}) must be at least {VOCABULARY_SIZE}: tokens are bytes"
            )
        position = model.position
        if isinstance(position, LearnedPositionConfig) and position.max_length < training.sequence_length:
            raise ValueError(
                f"model.position.max_length ({position.max_length}) is smaller than "
                f"training.sequence_length ({training.sequence_length})"
            )
        refuse_trainable(training.trainable, model)
        writes_sample = self.run.sample is not None
        refuse_engine(training.engine, self.parallel, dtype=training.dtype, writes_sample=writes_sample)
        if self.run.sample is not None and training.sequence_length < 2:
            raise ValueError(
                f"run.sample is given but training.sequence_length ({training.sequence_length}) is smaller than 2: it "
                "is how many tokens the model sees when it writes"
            )
        if isinstance(self.parallel.pipeline, InterleavedConfig) and self.parallel.pp == 1:
            raise ValueError("parallel.pipeline.kind is 'interleaved' but parallel.pp is 1: there is no pipeline")
        if model.moe is None:
            for name in ("ep", "etp"):
                if (degree := getattr(self.parallel, name)) > 1:
                    raise ValueError(f"parallel.{name} is {degree} but the model has no experts (model.moe)")
            if self.parallel.expert_order != list(EXPERT_ORDER):
                raise ValueError("parallel.expert_order is given but the model has no experts (model.moe)")
            if isinstance(self.parallel.data, ShardedConfig) and self.parallel.data.expert_shards is not None:
                raise ValueError("parallel.data.expert_shards is given but the model has no experts (model.moe)")
            if training.routing is not None:
                raise ValueError("training.routing is given but the model has no experts (model.moe)")
            if training.recompute == "moe":
                raise ValueError("training.recompute is 'moe' but the model has no experts (model.moe)")
            return self
        if model.moe.num_experts < self.parallel.ep:
            raise ValueError(
                f"model.moe.num_experts ({model.moe.num_experts}) is smaller than parallel.ep "
                f"({self.parallel.ep}): each expert-parallel rank must hold at least one expert"
            )
        if self.parallel.ep > 1 and model.moe.dispatcher.kind == "local":
            raise ValueError(
                f"model.moe.dispatcher.kind 'local' cannot reach the experts of other ranks: parallel.ep is "
                f"{self.parallel.ep}, it must be 1 (or use 'all_to_all')"
            )
        capacity, dispatcher = model.moe.capacity, model.moe.dispatcher
        if isinstance(training.routing, PlayConfig) and isinstance(capacity, LimitSettings) and capacity.pad:
            raise ValueError(
                "model.moe.capacity.pad is true but training.routing.kind is 'play': what was recorded may not "
                "fit into this capacity; set model.moe.capacity.pad to false, the result is the same"
            )
        if training.dtype == "bfloat16" and dispatcher.exchange_dtype == "bfloat16":
            raise ValueError(
                "model.moe.dispatcher.exchange_dtype is 'bfloat16' and so is training.dtype: it would change nothing"
            )
        self.check_backend("cuda" if self.runtime.device == "cuda" else "cpu")
        return self

    def check_backend(self, device_type: str) -> None:
        """ValueError where the experts' backend cannot run on this device; known for sure when the run starts."""
        if self.model.moe is None:
            return
        experts, device = self.model.moe.experts, torch.device(device_type)
        hidden = experts.hidden // self.parallel.etp
        sizes = (self.model.d_model, width_in(experts.activation, hidden), hidden)
        if experts.backend == "grouped_mm" and not takes_grouped_mm(DTYPES[self.training.dtype], device, sizes):
            raise ValueError(
                f"model.moe.experts.backend 'grouped_mm' cannot multiply these: training.dtype is "
                f"{self.training.dtype} (it takes float32 and bfloat16, on CUDA bfloat16 alone), model.d_model is "
                f"{self.model.d_model} and model.moe.experts.hidden is {experts.hidden} (it takes 16-byte multiples)"
            )


class _Loader(yaml.SafeLoader):
    """safe_load, with 3e-4 read as a number (YAML 1.2) and a key given twice refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused below, by its own words
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """safe_dump, with quotes around a text that the loader would read as a number."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, overrides (`dotted.key=value`, the value as YAML), validates. ValueError: one sentence with the path."""
    return read_settings(Config, load_tree(path, overrides), str(path))


def load_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a YAML file and overrides say, as it stands. ValueError where it is no mapping."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"the config file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"the config file {path} must hold a mapping of settings, found {_shown(tree)}")
    for override in overrides:
        _override(tree, override)
    return tree


def read_config(tree: dict[str, Any], where: str) -> Config:
    return read_settings(Config, tree, where)


def read_settings(kind: type[S], tree: dict[str, Any], where: str) -> S:
    """Validates. ValueError: one sentence that begins with `where` and names the path."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{where}: {_first_sentence(error, tree, setting_paths(kind))}") from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML; `load_config` of it gives the same config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def setting_paths(block: type[Settings] = Config, prefix: str = "") -> list[str]:
    """Every path that a config can have, blocks included; `losses[]` is each entry of the list `losses`."""
    paths = []
    for name, field in block.model_fields.items():
        paths.append(prefix + name)
        for brackets, inner in _blocks_in(field.annotation):
            paths += setting_paths(inner, f"{prefix}{name}{brackets}.")
    return list(dict.fromkeys(paths))


def _blocks_in(annotation: Any) -> Iterator[tuple[str, type[Settings]]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield "", annotation
    for argument in get_args(annotation):
        for brackets, block in _blocks_in(argument):
            yield ("[]" if get_origin(annotation) is list else "") + brackets, block


def _override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *parents, leaf = dotted.split(".")
    if not equals or not all([*parents, leaf]):
        raise ValueError(f"the override {override!r} is not of the form dotted.key=value")
    for depth, key in enumerate(parents):
        if tree.get(key) is None:  # an absent block, or one that a dumped config shows as null
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise ValueError(f"the override {override!r}: {'.'.join(parents[: depth + 1])} is not a block of settings")
    try:
        tree[leaf] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"the override {override!r} is not valid YAML: {' '.join(str(error).split())}") from error


def _first_sentence(error: ValidationError, tree: Any, paths: list[str]) -> str:
    """The first thing that is wrong: `path: what, found value`, and how many more there are. A misspelt setting
    goes first: others may be missing because of it."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] not in ("extra_forbidden", "invalid_key"))
    first, context = details[0], details[0].get("ctx", {})
    path = _user_path(first["loc"], tree, is_missing=first["type"] == "missing")
    match first["type"]:
        case "extra_forbidden":
            text = f"unknown setting {path}{_did_you_mean(path, paths)}"
        case "value_error":
            text = _with_full_paths(str(context["error"]), path, paths)
        case "missing":
            text = f"{path} is missing"
        case "union_tag_not_found":
            text = f"{path}.kind is missing"
        case "union_tag_invalid":
            text = f"{path}.kind is {context['tag']!r}, it must be one of {context['expected_tags']}"
        case "model_type" | "model_attributes_type":
            text = f"{path} must be a block of settings, found {_shown(first['input'])}"
        case _:
            text = f"{path}: {first['msg'][0].lower()}{first['msg'][1:]}, found {_shown(first['input'])}"
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return text + more


def _user_path(location: tuple[int | str, ...], tree: Any, is_missing: bool) -> str:
    """pydantic's location without the kinds that it puts in between: capacity.factor.train is capacity.train."""
    path = ""
    for number, part in enumerate(location):
        is_entry = isinstance(tree, list) and isinstance(part, int)
        is_key = is_entry or (isinstance(tree, dict) and part in tree)
        if is_key:
            tree = tree[part]
        if is_key or (is_missing and number == len(location) - 1):
            path += f"[{part}]" if is_entry else f".{part}"
    return path.removeprefix(".")


def _with_full_paths(text: str, block: str, paths: list[str]) -> str:
    """A block's own check names settings as the block does (`router.k`): with the block's path before each of them.

    A single word is a setting only where a value or a statement follows: `hidden (3)`, but not `the router learns`.
    """

    def full(word: re.Match[str]) -> str:
        names_setting = re.search("[._]", word[0]) or text[word.end() :].startswith((" (", " is ", " = ", ": "))
        path = f"{block}.{word[0]}"
        return path if names_setting and path in paths else word[0]

    result = re.sub(r"(?<![\w.])\w+(\.\w+)*", full, text) if block else text
    return result if result != text or not block else f"{block}: {text}"


def _did_you_mean(path: str, paths: list[str]) -> str:
    """The setting of this name in another block, or the one of its block that is spelt most alike."""
    block, _, name = re.sub(r"\[\d+\]", "[]", path).rpartition(".")
    if ".".join(filter(None, (block, name))) in paths:
        return f" (another kind of {block} has it)"
    settings = [other.rpartition(".") for other in paths]
    found = [".".join(filter(None, (b, n))) for b, _, n in settings if n == name]
    if not found:
        close = difflib.get_close_matches(name, [n for b, _, n in settings if b == block], n=1)
        found = [".".join(filter(None, (block, n))) for n in close]
    return f" (did you mean {' or '.join(found)}?)" if len(found) in (1, 2) else ""


def _shown(value: Any) -> str:
    """As YAML has it, in a line of bounded length."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
