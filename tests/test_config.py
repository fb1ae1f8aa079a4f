"""A config file's promises: what is read is what was written, in YAML and by override, by a setting's own name or its
alias.

What is refused, and in which words, is in test_command_line.py; the list of all settings in test_settings_reference.py.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from expert_parallel.config import load_tree
from expert_parallel.data.config import FilesData, TokensData
from expert_parallel.model.config import ModelConfig
from expert_parallel.moe.capacity.policies import DroplessConfig, FactorConfig
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.routers.registry import RegisteredRouterConfig
from expert_parallel.parallel.degrees import ParallelConfig
from expert_parallel.settings import Settings, alias_of, blocks_in, changed_settings, setting_paths, use_own_names
from expert_parallel.study.definition import StudyConfig
from expert_parallel.training.config import Config, dump_config, load_config
from tests.launches import run_configs, small_config

SHIPPED = run_configs()


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return small_config(tmp_path)


def written(folder: Path, text: str) -> Path:
    path = folder / "written.yaml"
    path.write_text(text)
    return path


def leaf_paths(tree: Any, prefix: str = "") -> set[str]:
    """Of a dumped config; `[]` for each entry of a list of blocks."""
    if isinstance(tree, dict):
        return {path for key, value in tree.items() for path in leaf_paths(value, f"{prefix}.{key}")}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return {path for entry in tree for path in leaf_paths(entry, prefix + "[]")}
    return {prefix.removeprefix(".")}


# ---------------------------------------------------------------------------------------------------------------------
# Dump and load


def test_there_are_shipped_configs() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_survives_dump_and_load(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load_config(written(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    "override",
    [
        "training.clip_norm=null",  # null is a value here: no clipping; the default is 1.0
        "training.clip_norm=0.5",
        "training.optimizer.learning_rate=1e-5",
        "training.optimizer.betas=[0.8, 0.99]",
        "model.moe.losses=[]",
        "model.moe.losses=[{kind: balance, scope: rank}, {kind: z_loss, coefficient: 2e-3}]",
        "model.moe.losses=[{kind: balance, choices: first, layers: pooled}]",
        "model.moe.capacity={kind: dropless}",
        "model.moe.capacity={kind: dropless, receive_bound: 1.5}",
        "model.moe.capacity={kind: absolute, train: 9, eval: 12, scope: sequence, overflow: reroute, pad: true}",
        "model.moe.capacity.priority=random",
        "model.moe.router={kind: top_k, k: 2, group_limit: {count: 2, limit: 1, score: max}}",
        "model.moe.router={kind: noisy_top_k, noise: normal, std: 0.1}",
        "model.moe.router={kind: gshard, second: gumbel}",
        "model.moe={preset: hash_layers, num_experts: 4, experts: {hidden: 16}}",
        "model.moe={preset: switch, router: {jitter: 0.0}, num_experts: 4, experts: {hidden: 16}}",
        "model.moe.router={kind: sinkhorn, k: 2}",
        "model.moe.dispatcher={kind: hierarchical, one_row_per: choice, exchange_dtype: bfloat16}",
        "model.moe.ledger={kind: rows, breach: warn}",
        "parallel.ranks_per_node=2",
        "model.position={kind: learned, max_length: 64}",
        "model.moe_blocks={kind: list, indices: [0, 1]}",
        "run.sample={prompt: 'def f(x):'}",
        "run.sample={prompt: '3e-4'}",  # texts that YAML would read as something else, were they not quoted
        "run.sample={prompt: '1.5'}",
        "run.sample={prompt: 'null'}",
        "run.sample={prompt: 'yes'}",
        "run.sample={prompt: '1:30'}",
        "run.sample={prompt: '2026-11-22'}",
        "run.sample={prompt: '- a: b # c'}",
        'run.sample={prompt: "ä\\n\\t  \\u2603 \\0"}',
    ],
)
def test_a_value_survives_dump_and_load(override: str, config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, [override])
    assert config != load_config(config_file), "the override says something"
    assert load_config(written(tmp_path, dump_config(config))) == config


def test_null_is_not_the_default(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["training.clip_norm=null"])
    assert config.training.clip_norm is None
    assert load_config(written(tmp_path, dump_config(config))).training.clip_norm is None
    assert load_config(config_file).training.clip_norm == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# YAML


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "3E-4", "0.0003", "+3e-4"])
def test_a_number_is_read_as_people_write_it(text: str, config_file: Path) -> None:
    rate = load_config(config_file, [f"training.optimizer.learning_rate={text}"]).training.optimizer.learning_rate
    assert rate == 3e-4


@pytest.mark.parametrize(("block", "every"), [("{<<: *often}", 7), ("{<<: *often, every: 8}", 8)])
def test_a_merged_block_gives_what_the_block_itself_does_not_say(block: str, every: int, config_file: Path) -> None:
    old, new = "evaluation: {every: 1, sequences: 4}", f"checkpoint: &often {{every: 7}}\nevaluation: {block}"
    text = config_file.read_text()
    assert old in text
    config = load_config(written(config_file.parent, text.replace(old, new)))
    assert (config.checkpoint.every, config.evaluation.every) == (7, every)


def test_a_python_tag_is_refused_and_not_executed(config_file: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    tag = f"!!python/object/apply:os.system ['touch {trace}']"
    for path, overrides in (
        (written(tmp_path, f"{config_file.read_text()}\nseed: {tag}\n"), []),
        (config_file, [f"seed={tag}"]),
    ):
        with pytest.raises(ValueError, match="not valid YAML: could not determine a constructor for the tag"):
            load_config(path, overrides)
    assert not trace.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Overrides


def test_overrides_change_what_they_name_and_nothing_else(config_file: Path) -> None:
    before = load_config(config_file)
    after = load_config(config_file, ["model.moe.router.k=3", "training.steps=9", "data.paths=[a.txt, b.txt]"])
    assert before.model.moe is not None
    router = before.model.moe.router.model_copy(update={"k": 3})
    expected = before.model_copy(
        update={
            "model": before.model.model_copy(update={"moe": before.model.moe.model_copy(update={"router": router})}),
            "training": before.training.model_copy(update={"steps": 9}),
            "data": before.data.model_copy(update={"paths": ["a.txt", "b.txt"]}),
        }
    )
    assert after == expected


def test_a_later_override_wins(config_file: Path) -> None:
    assert load_config(config_file, ["seed=1", "seed=2"]).seed == 2


def test_an_override_makes_the_block_that_is_missing(config_file: Path) -> None:
    sample = load_config(config_file, ["run.sample.prompt=a=b", "run.sample.length=5"]).run.sample
    assert sample is not None
    assert (sample.prompt, sample.length) == ("a=b", 5)


def test_an_override_reaches_a_block_that_a_dumped_config_shows_as_null(config_file: Path, tmp_path: Path) -> None:
    dumped = written(tmp_path, dump_config(load_config(config_file)))
    assert yaml.safe_load(dumped.read_text())["run"]["sample"] is None
    sample = load_config(dumped, ["run.sample.prompt=x"]).run.sample
    assert sample is not None
    assert sample.prompt == "x"


def test_a_block_may_be_replaced_whole(config_file: Path) -> None:
    for text, expected in (("{kind: dropless}", DroplessConfig()), ("{kind: factor}", FactorConfig(kind="factor"))):
        moe = load_config(config_file, [f"model.moe.capacity={text}"]).model.moe
        assert moe is not None
        assert moe.capacity == expected


FOLDER, PROMPT = "run.folder", "run.sample.prompt"
GROWING = "&a [0], " + ", ".join(f"&{x} [{', '.join([f'*{y}'] * 9)}]" for y, x in pairwise("abcdefg"))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        (FOLDER, "exp #2", "exp #2"),
        (FOLDER, "a: b", "a: b"),
        (FOLDER, "[x", "[x"),
        (FOLDER, "1:30", "1:30"),
        (FOLDER, "null", "null"),
        (FOLDER, "'in quotes #'", "in quotes #"),
        (FOLDER, "'tis", "'tis"),
        (FOLDER, "~/x", "/home/me/x"),
        (FOLDER, "./~x", "./~x"),
        (FOLDER, "$MINE/${MINE}", "/m $1/~/#a//m $1/~/#a"),
        (FOLDER, "a$$MINE", "a$MINE"),
        ("checkpoint.start_from", "null", None),
        ("checkpoint.start_from", "~", "/home/me"),
        ("data.paths", "*.txt", ["*.txt"]),
        ("data.paths", "%x", ["%x"]),
        ("data.paths", "[ab]*.txt", ["[ab]*.txt"]),
        ("data.paths", "[a #b, ~/c]", ["a #b", "/home/me/c"]),
        ("data", "{kind: files, paths: $MINE #}", ["/m $1/~/#a #"]),
        ("data", "{kind: tokens, corpora: [{path: ~/t}], tokenizer: $MINE}", ("/home/me/t", "/m $1/~/#a")),
        (PROMPT, "%x # $MINE", "%x # $MINE"),
        (PROMPT, "010", "010"),
        ("data.sha256", "1" * 64, "1" * 64),
    ],
)
def test_a_text_and_a_path_are_taken_as_they_are(
    key: str, text: str, value: Any, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for `~` and variables of paths; the config that a run writes has the same paths, whatever they contain."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MINE", "/m $1/~/#a")
    config = load_config(config_file, [f"{key}={text}"])
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    if isinstance(found, FilesData):
        found = found.paths
    elif isinstance(found, TokensData):
        found = (found.corpora[0].path, found.tokenizer)
    assert found == value
    assert load_config(written(tmp_path, dump_config(config))) == config


def test_paths_are_expanded_in_files(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a study's base, too."""
    monkeypatch.setenv("MINE", "/mine")
    text = config_file.read_text().replace(str(config_file.parent), "$MINE")
    assert text.count("$MINE") == 2
    config = load_config(written(tmp_path, text + "checkpoint: {start_from: ~/x}\n"))
    assert isinstance(config.data, FilesData)
    assert (config.run.folder, config.data.paths) == ("/mine/run", ["/mine/text.txt"])
    assert config.checkpoint.start_from == f"{Path.home()}/x"
    study = "{base: {data: {paths: $MINE/a}}, folder: $MINE}"
    tree = load_tree(written(tmp_path, study), ["base.data.tokenizer=$MINE #b"], StudyConfig)
    assert tree == {"base": {"data": {"paths": "/mine/a", "tokenizer": "/mine #b"}}, "folder": "/mine"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("$NOT_SET/x", "run.folder: the environment variable NOT_SET is not set, or empty, in '$NOT_SET/x'"),
        ("$EMPTY/x", "run.folder: the environment variable EMPTY is not set, or empty"),
        ("a$", "run.folder: 'a$' has a '$' that begins no variable: write '$$'"),
        ("~nobody-here/x", "run.folder: '~nobody-here/x' begins with ~nobody-here, but there is no such user"),
        ("x" * 256, "run.folder: a name in this path has 256 bytes, file systems take at most 255"),
        ("ä/" * 1200, "run.folder: this path has 3600 bytes, it must have at most 3500"),
        ('"a\\0b"', "run.folder: a path cannot contain the character NUL"),
    ],
    ids=lambda text: text[:20],
)
def test_a_path_that_cannot_be_is_refused(
    value: str, words: str, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(config_file, [f"run.folder={value}"])
    text = re.sub("folder: [^,]*", lambda _: f"folder: {value}", config_file.read_text())
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(written(config_file.parent, text))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("010", "'010' is an octal number in YAML 1.1: write it without the leading zero"),
        ("-07", "'-07' is an octal number"),
        ("1:30", "'1:30' is a number of base 60 in YAML 1.1"),
        ("12:34:56.7", "'12:34:56.7' is a number of base 60"),
        ("0o10", 'seed: input should be a valid integer, found "0o10"'),
        ("2026-11-22", 'seed: input should be a valid integer, found "2026-11-22"'),
        ("!!timestamp x", "the tag 'tag:yaml.org,2002:timestamp' is not allowed"),
        ("!!int x", "'x' is not a number"),
        ("!!bool x", "'x' is neither true nor false"),
        ("*x", "undefined alias 'x' (line 1"),
        ("%x", "a text that has a meaning in YAML must stand in quotes"),
        ("9" * 5000, "a number has 5000 characters, it must have at most 40"),
        ("0x" + "f" * 5000, "a number has 5002 characters"),
        ("[" * 400 + "]" * 400, "nested more than 50 deep"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("&a [*a]", "nested more than 50 deep"),
        (f"[{GROWING}]", "larger than 100,000 values"),
    ],
    ids=lambda text: text[:20],
)
def test_a_number_that_means_something_else_in_yaml_is_refused(value: str, words: str, config_file: Path) -> None:
    """And what would be read without end."""
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(config_file, [f"seed={value}"])
    with pytest.raises(ValueError, match=re.escape(words.replace("(line 1", "(line 18"))):
        load_config(written(config_file.parent, f"{config_file.read_text()}seed: {value}\n"))


# ---------------------------------------------------------------------------------------------------------------------
# Aliases

LATENT = (
    "model.attention={kind: latent, num_heads: 2, query_rank: 4, kv_rank: 8, nope_size: 4, rope_size: 4, value_size: 8}"
)
ALIASES = [  # overrides, own name, alias, a value
    (["model.moe.router.k=2"], "model.moe.router.normalise", "model.moe.router.normalize", "false"),
    (["model.moe.router={kind: sinkhorn, k: 2}"], "model.moe.router.normalise", "model.moe.router.normalize", "true"),
    ([], "model.attention.rope_size", "model.attention.rotary_dim", "4"),
    (
        ["model.moe.capacity={kind: factor}"],
        "model.moe.capacity.renormalise",
        "model.moe.capacity.renormalize",
        "true",
    ),
    (
        ["model.moe.capacity={kind: dropless}"],
        "model.moe.capacity.receive_bound",
        "model.moe.capacity.max_received_factor",
        "1.5",
    ),
    ([], "model.moe.experts.hidden", "model.moe.experts.ffn_hidden_size", "24"),
    (
        ["model.moe.shared_experts={hidden: 8}"],
        *(f"model.moe.shared_experts.{n}" for n in ("hidden", "ffn_hidden_size")),
        "24",
    ),
    ([], "model.attention.head_size", "model.attention.head_dim", "4"),
    ([LATENT], "model.attention.query_rank", "model.attention.q_lora_rank", "6"),
    ([LATENT], "model.attention.kv_rank", "model.attention.kv_lora_rank", "6"),
    ([LATENT], "model.attention.nope_size", "model.attention.qk_nope_head_dim", "6"),
    ([LATENT], "model.attention.rope_size", "model.attention.qk_rope_head_dim", "6"),
    ([LATENT], "model.attention.value_size", "model.attention.v_head_dim", "6"),
    ([], "training.global_batch", "training.global_batch_size", "8"),
    ([], "training.micro_steps", "training.gradient_accumulation_steps", "2"),
]


def aliases_of_all(block: type[Settings]) -> set[str]:
    own = {alias for name in block.model_fields if (alias := alias_of(block, name))}
    inner = [found for field in block.model_fields.values() for _, found in blocks_in(field.annotation)]
    return own.union(*(aliases_of_all(found) for found in inner))


def test_every_alias_is_in_the_table() -> None:
    assert {alias.rpartition(".")[2] for _, _, alias, _ in ALIASES} == aliases_of_all(Config)


@pytest.mark.parametrize(("first", "name", "alias", "value"), ALIASES, ids=lambda value: str(value))
def test_an_alias_means_its_setting(first: list[str], name: str, alias: str, value: str, config_file: Path) -> None:
    """As an override, over a file with either name, in a file, and in a dumped config, which has own names alone."""
    expected = load_config(config_file, [*first, f"{name}={value}"])
    assert load_config(config_file, [*first, f"{alias}={value}"]) == expected
    assert expected != load_config(config_file, first), "the value is another than before"
    before = written(config_file.parent, dump_config(load_config(config_file, first)))
    assert load_config(before, [f"{alias}={value}"]) == expected
    tree = yaml.safe_load(dump_config(expected))
    *blocks, last = name.split(".")
    block = tree
    for key in blocks:
        block = block[key]
    block[alias.rpartition(".")[2]] = block.pop(last)
    spelled = written(config_file.parent, yaml.safe_dump(tree))
    assert load_config(spelled) == expected
    assert load_config(spelled, [f"{name}={value}"]) == expected
    assert dump_config(load_config(spelled)) == dump_config(expected)
    assert changed_settings(expected.model_dump(mode="json"), load_config(spelled).model_dump(mode="json")) == []


def test_a_later_spelling_wins(config_file: Path) -> None:
    overrides = ["training.global_batch=4", "training.global_batch_size=8"]
    assert load_config(config_file, overrides).training.global_batch == 8
    assert load_config(config_file, overrides[::-1]).training.global_batch == 4


@pytest.mark.parametrize(
    ("override", "names"),
    [
        (
            "model.moe.router={normalise: true, normalize: true}",
            "model.moe.router.normalise and model.moe.router.normalize",
        ),
        ("model.attention.head_dim=8", "model.attention.head_size and model.attention.head_dim"),
    ],
)
def test_a_setting_is_given_by_one_name(override: str, names: str, config_file: Path) -> None:
    key, _, value = override.partition("=")
    *blocks, last = key.split(".")
    tree = yaml.safe_load(config_file.read_text())
    block = tree
    for name in blocks:
        block = block[name]
    block[last] = yaml.safe_load(value)
    path = written(config_file.parent, yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=rf"^{path}: {names} are the same setting: give one of them$"):
        load_config(path)


def test_a_preset_gives_way_to_an_alias() -> None:
    tree = {"preset": "switch", "preset_overrides": True, "num_experts": 4, "experts": {"ffn_hidden_size": 8}}
    moe = MoEConfig.model_validate(tree | {"router": {"k": 2, "normalize": True}})
    assert (moe.router.normalizes, moe.experts.hidden) == (True, 8)
    with pytest.raises(ValueError, match=r"router\.normalise and router\.normalize are the same setting"):
        MoEConfig.model_validate(tree | {"router": {"normalise": True, "normalize": True}})


def test_a_registered_router_may_have_a_setting_of_an_aliass_name() -> None:
    """Its settings are its own."""
    tree = {"moe": {"router": {"kind": "mine", "normalize": 3}}}
    assert use_own_names([ModelConfig], tree) == tree
    assert use_own_names([ModelConfig], {"moe": {"router": {"normalize": False}}}) == {
        "moe": {"router": {"normalise": False}}
    }


def test_a_studys_base_and_variants_take_aliases() -> None:
    base = {"training": {"global_batch_size": 4}}
    variants = {"a": {"model": {"attention": {"head_dim": 8}}}, "b": {}}
    study = StudyConfig(
        folder="x", base=base, reference="a", variants=variants, learning_rates=[0.1], trial_steps=1, seeds=[0]
    )
    assert study.base == {"training": {"global_batch": 4}}
    assert study.variants["a"].model == {"attention": {"head_size": 8}}


# ---------------------------------------------------------------------------------------------------------------------
# The surface


def test_every_dumped_setting_is_on_the_surface(config_file: Path) -> None:
    """And so the walk over the classes leaves nothing out."""
    dumps = [dump_config(load_config(path)) for path in (*SHIPPED, config_file)]
    paths = {path for dump in dumps for path in leaf_paths(yaml.safe_load(dump))}
    assert paths <= set(setting_paths(Config))
    assert "model.moe.losses[].coefficient" in paths


def test_settings_do_not_change_once_they_are_checked(config_file: Path) -> None:
    config = load_config(config_file)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 5


def test_every_block_is_strict() -> None:
    """But for one that lets unknown settings through on purpose: a registered router's own Config checks them."""

    def below(block: type[Settings]) -> list[type[Settings]]:
        return [block, *(lower for child in block.__subclasses__() for lower in below(child))]

    for block in below(Settings):
        rules = {name: block.model_config.get(name) for name in ("strict", "extra", "frozen")}
        extra = "allow" if block is RegisteredRouterConfig else "forbid"
        assert rules == {"strict": True, "extra": extra, "frozen": True}, block
    assert {Config, RegisteredRouterConfig} <= set(below(Settings))


# ---------------------------------------------------------------------------------------------------------------------
# Configs made in Python

MOE: dict[str, Any] = {"num_experts": 4, "experts": {"hidden": 8}}
DENSE: dict[str, Any] = {"num_layers": 1, "d_model": 8, "attention": {"num_heads": 1, "head_size": 8}}


@pytest.mark.parametrize(
    ("block", "tree", "sentence"),
    [
        (
            MoEConfig,
            {**MOE, "num_expert": 4},
            "MoEConfig: unknown setting num_expert (did you mean num_experts?)",
        ),
        (MoEConfig, {**MOE, "topk": 2}, "MoEConfig: unknown setting topk (did you mean router.k?)"),
        (
            MoEConfig,
            {**MOE, "router": {"kk": 2}},
            "MoEConfig: unknown setting router.kk (did you mean router.k?)",
        ),
        (MoEConfig, {**MOE, "router": {"k": 5}}, "MoEConfig: router.k (5) is larger than num_experts (4)"),
        (MoEConfig, {"num_experts": 4}, "MoEConfig: experts is missing"),
        (MoEConfig, {"num_experts": 4, "expert": {"hidden": 8}}, "MoEConfig: unknown setting expert (did you mean"),
        (MoEConfig, {**MOE, "preset": "mistral"}, "MoEConfig: preset is 'mistral', it must be one of"),
        (MoEConfig, {**MOE, "losses": [{"kind": "balance", "coef": 1}]}, "MoEConfig: unknown setting losses[0].coef"),
        (
            ModelConfig,
            {**DENSE, "moe": {**MOE, "router": {"kk": 2}}},
            "ModelConfig: unknown setting moe.router.kk (did you mean moe.router.k?)",
        ),
        (
            ModelConfig,
            {**DENSE, "hidden_size": 8},
            "ModelConfig: unknown setting hidden_size (did you mean d_model?)",
        ),
        (
            Config,
            {"run": {"folder": "x"}, "model": {**DENSE, "moe": MOE}, "training": {"lr": 1}},
            "Config: unknown setting training.lr (did you mean training.optimizer.learning_rate?) (and 3 more)",
        ),
        (ParallelConfig, {"expert_parallel": 2}, "ParallelConfig: unknown setting expert_parallel (did you mean ep?)"),
    ],
)
def test_a_mistake_in_python_is_one_sentence(block: type[Settings], tree: dict[str, Any], sentence: str) -> None:
    for make in (lambda: block.model_validate(tree), lambda: block(**tree)):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}") as refused:
            make()
        assert "\n" not in str(refused.value)
        assert refused.value.__suppress_context__, "a traceback shows the sentence alone"


def test_what_is_no_block_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^MoEConfig: must be a block of settings, found \[1\]$"):
        MoEConfig.model_validate([1])


def test_blocks_made_in_python_may_stand_in_others() -> None:
    """Also where a block inside is validated again: no sentence stands within a sentence."""
    moe = MoEConfig(num_experts=4, experts={"hidden": 8})  # type: ignore[arg-type]
    assert ModelConfig.model_validate({**DENSE, "moe": moe}).moe == moe
    with pytest.raises(ValueError, match=r"^ModelConfig: moe\.d_model \(9\) differs from d_model \(8\)$"):
        ModelConfig.model_validate({**DENSE, "moe": moe.model_copy(update={"d_model": 9})})
