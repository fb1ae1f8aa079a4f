"""Generation from imported models: the tokens of transformers' `generate` with its defaults, over all families, and
what the files of a folder change."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner, Result

from expert_parallel.cli.app import app
from expert_parallel.data.open import save_tokenizer as save_tokenizer_of
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.importing import import_folder
from expert_parallel.interop.surgery import add, perform_surgery
from expert_parallel.training.config import load_config
from expert_parallel.training.generate import open_prompt_tokenizer
from expert_parallel.training.start import RunStart
from tests.interop_models import MODELS
from tests.test_interop import SHARD, make_peer

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
WORDS = 200  # the models have 260 token ids
BOS, EOS = WORDS + 1, WORDS + 2  # ids of the first two special tokens, which follow `<unk>` and the words
PROMPTS = ("w9 w30 w7", "w20", "w1 w2 w3 w4 w5 w6")
CHAT = "<|im_start|> w9 <|im_end|> w30 <|im_start|>"
NUM_TOKENS = 8


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def generated(run: Path, *options: str, prompts: tuple[str, ...] = PROMPTS) -> Result:
    """The greedy texts of a run, as the command prints them."""
    chosen = [option for prompt in prompts for option in ("--prompt", prompt)]
    result = invoke("generate", run, "--tokens", str(NUM_TOKENS), "--temperature", "0", *chosen, *options)
    assert result.exit_code == 0, result.output
    return result


def save_tokenizer(folder: Path, template: str | None = "<s> $A", **config: Any) -> None:
    """A word for each token, so that texts are equal only if tokens are. The last ids of the models have no word."""
    vocabulary = {word: number for number, word in enumerate(("<unk>", *(f"w{n}" for n in range(WORDS))))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    if template is not None:
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    tree = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(tree))


def save_peer(folder: Path, name: str = "llama", **generation: Any) -> None:
    make_peer(name).save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))


@torch.no_grad()
def their_texts(folder: Path, prompts: tuple[str, ...] = PROMPTS, *, skip: bool = True) -> list[str]:
    """What transformers makes of a folder with nothing said but the number of tokens, each prompt alone."""
    there = {"attn_implementation": "eager", "experts_implementation": "eager"}
    # AutoModelForCausalLM does not find all of the classes.
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    model = getattr(transformers, FAMILIES[model_type].architecture).from_pretrained(folder, **there).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)  # Auto would rebuild some families' own
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=NUM_TOKENS)[0]
        texts.append(tokenizer.decode(ids, skip_special_tokens=skip))
    return texts


def printed(texts: list[str]) -> str:
    return f"\n{'-' * 80}\n".join(texts) + "\n"


def end_in(text: str, place: int) -> int:
    """The id of a text's word, the first from a place on that is no special token, to end it there."""
    return int(next(word for word in text.split()[place:] if word.startswith("w"))[1:]) + 1


# Of each kind of cache one; texts of the others, greedily, are compared in test_interop.py.
CACHES = ("llama", "mixtral", "deepseek_v3", "gpt_oss", "mimo_v2_flash", "llama4_text", "phimoe")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in CACHES else pytest.mark.full)
        for name in FAMILIES
        if name in MODELS  # Kimi K2 is DeepSeek-V3 there
    ],
)
def test_every_family_writes_what_transformers_writes(name: str, tmp_path: Path) -> None:
    """Several prompts at once: one ends with the first end token, one with the second, and others go on."""
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    save_peer(theirs, name)
    free = their_texts(theirs)
    ends = [end_in(free[0], 3), end_in(free[1], 2)]
    (theirs / "generation_config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": ends}))
    texts = their_texts(theirs)
    assert len({len(text.split()) - len(prompt.split()) for text, prompt in zip(texts, PROMPTS, strict=True)}) > 1
    assert texts != free
    import_folder(theirs, run, SHARD)
    result = generated(run)
    assert (result.stdout, result.stderr) == (printed(texts), "")

    chat = their_texts(theirs, (CHAT,), skip=False)
    assert generated(run, "--special-tokens", prompts=(CHAT,)).stdout == printed(chat)
    assert chat[0].startswith(f"<s> {CHAT}")


def changed(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads((folder / file).read_text())
    change(tree)
    (folder / file).write_text(json.dumps(tree))


def only_in_config(folder: Path, ends: list[int]) -> None:
    (folder / "generation_config.json").unlink()
    changed(folder, "config.json", lambda tree: tree.update(eos_token_id=ends))


def ends_in_config_are_not_read(folder: Path, ends: list[int]) -> None:
    changed(folder, "config.json", lambda tree: tree.update(eos_token_id=ends))


def one_end(folder: Path, ends: list[int]) -> None:
    changed(folder, "generation_config.json", lambda tree: tree.update(eos_token_id=ends[1]))


def one_in_each_file(folder: Path, ends: list[int]) -> None:
    changed(folder, "config.json", lambda tree: tree.update(eos_token_id=ends[0]))
    one_end(folder, ends)


def nothing_added(folder: Path, ends: list[int]) -> None:
    save_tokenizer(folder, None, add_bos_token=False)


def both_added(folder: Path, ends: list[int]) -> None:
    save_tokenizer(folder, "<s> $A </s>", add_bos_token=False)


def harmless_settings(folder: Path, ends: list[int]) -> None:
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None, "num_beams": 1}
    draws = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    changed(folder, "generation_config.json", lambda tree: tree.update({**neutral, **draws, "max_length": 4}))


@pytest.mark.parametrize(
    "prepare",
    [
        only_in_config,
        ends_in_config_are_not_read,
        one_end,
        one_in_each_file,
        nothing_added,
        both_added,
        harmless_settings,
    ],
)
def test_files_are_followed_as_in_transformers(prepare: Callable[[Path, list[int]], None], tmp_path: Path) -> None:
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    save_peer(theirs)
    free = their_texts(theirs)
    prepare(theirs, [end_in(free[0], 3), end_in(free[1], 2)])
    import_folder(theirs, run, SHARD)
    result = generated(run)
    assert (result.stdout, result.stderr) == (printed(their_texts(theirs)), "")


def test_tokens_are_special_that_only_the_config_names(tmp_path: Path) -> None:
    """As pad_token, in a list, or with its properties; a word that is named is read as a token, and not printed."""
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    save_peer(theirs)
    typed = {"__type": "AddedToken", "content": "w1", "lstrip": False, "rstrip": False, "normalized": False}
    named = {"pad_token": typed, "additional_special_tokens": ["w2", "[absent]"]}
    save_tokenizer(theirs, **named)
    import_folder(theirs, run, SHARD)
    tokenizer = open_prompt_tokenizer(load_config(run / "config.yaml"), special_tokens=True)
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(theirs)
    assert tokenizer.encode("w1w2 w3") == peer("w1w2 w3").input_ids == [BOS, 2, 3, 4]
    plain = open_prompt_tokenizer(load_config(run / "config.yaml"))
    assert plain.encode("w1w2 w3") == [BOS, 0, 4]
    assert plain.decode([BOS, 2, 3, 4]) == peer.decode([BOS, 2, 3, 4], skip_special_tokens=True) == "w3"


@pytest.mark.parametrize("config", ["tokenizer_config.json", "special_tokens_map.json"])
def test_tokens_are_added_where_the_tokenizer_has_no_post_processor(config: str, tmp_path: Path) -> None:
    """As older versions of transformers did: they made such a tokenizer from its class and these settings."""
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    save_peer(theirs, bos_token_id=3)
    save_tokenizer(theirs, None, add_bos_token=True, add_eos_token=True)
    changed(theirs, "tokenizer_config.json", lambda tree: [tree.pop(name) for name in ("bos_token", "eos_token")])
    tree = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    if config == "tokenizer_config.json":
        changed(theirs, config, lambda there: there.update(tree))
    else:
        (theirs / config).write_text(json.dumps(tree))
    import_folder(theirs, run, SHARD)
    loaded = load_config(run / "config.yaml")
    assert open_prompt_tokenizer(loaded).encode("w9 <s>") == [BOS, 10, 0, EOS]
    assert open_prompt_tokenizer(loaded, special_tokens=True).encode("w9 <s>") == [BOS, 10, BOS, EOS]
    changed(run / "huggingface", config, lambda tree: tree.update(bos_token="[CLS]"))
    with pytest.raises(ValueError, match=re.escape("adds '[CLS]' to prompts, but tokenizer.json has no such token")):
        open_prompt_tokenizer(loaded)


def test_a_text_without_prompt_starts_with_the_bos_token(tmp_path: Path) -> None:
    """As `generate` without inputs does in transformers."""
    save_peer(tmp_path / "theirs", bos_token_id=7)
    save_tokenizer(tmp_path / "theirs", None)
    import_folder(tmp_path / "theirs", tmp_path / "run", SHARD)
    assert open_prompt_tokenizer(load_config(tmp_path / "run/config.yaml")).encode("") == [7]


def test_what_is_not_followed_is_said(tmp_path: Path) -> None:
    """In one sentence, which names what decides the tokens of this text, and nothing else."""
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    draws = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0.1, "typical_p": 1.0}
    save_peer(theirs, repetition_penalty=1.2, suppress_tokens=[5, 6], min_new_tokens=0, **draws)
    import_folder(theirs, run, SHARD)
    said = "generation_config.json sets repetition_penalty 1.2, suppress_tokens [5, 6]"
    assert generated(run, prompts=("w1",)).stderr.endswith(f"{said}, which are not followed\n")
    drawn = invoke("generate", run, "--prompt", "w1", "--tokens", "1", "--temperature", "0.6")
    assert drawn.stderr.endswith(f"{said}, top_p 0.9, min_p 0.1, which are not followed\n")
    (run / "huggingface/generation_config.json").write_text('{"temperature": 2.0}')
    drawn = invoke("generate", run, "--prompt", "w1", "--tokens", "1")
    assert drawn.stderr.endswith("generation_config.json sets temperature 2.0, which is not followed\n")


def test_an_imported_model_is_given_as_many_tokens_as_it_was_made_for(tmp_path: Path) -> None:
    """Also with shorter training sequences. The last text is of bytes: a run on other tokens follows its own rules."""
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    save_peer(theirs, eos_token_id=[97 + number for number in range(26)])
    import_folder(theirs, run, SHARD)
    assert generated(run, "training.sequence_length=4").stdout == printed(their_texts(theirs))
    of_bytes = open_prompt_tokenizer(load_config(run / "config.yaml", [f"run.folder={run}", "data={kind: stdlib}"]))
    assert of_bytes.encode("<s>a") == list(b"<s>a")
    assert (of_bytes.end_ids, of_bytes.imported) == ({0}, None)


def test_the_end_of_the_data_ends_texts_too(tmp_path: Path) -> None:
    save_peer(tmp_path / "theirs", eos_token_id=9)
    import_folder(tmp_path / "theirs", tmp_path / "run", SHARD)
    trained = ["data.corpora=[{path: elsewhere}]", "data.end_id=8"]
    assert open_prompt_tokenizer(load_config(tmp_path / "run/config.yaml")).end_ids == {9}
    assert open_prompt_tokenizer(load_config(tmp_path / "run/config.yaml", trained)).end_ids == {8, 9}


def test_runs_made_from_an_imported_one_follow_its_files(tmp_path: Path) -> None:
    """Runs with other experts, and runs that start from its weights."""
    run = tmp_path / "run"
    save_peer(tmp_path / "theirs", "mixtral", eos_token_id=[9, 10])
    import_folder(tmp_path / "theirs", run, SHARD)
    edited = perform_surgery(run, tmp_path / "edited", add(4, [1], noise=0.0, seed=0), SHARD)
    started = load_config(run / "config.yaml", [f"run.folder={tmp_path}/started"])
    (tmp_path / "started").mkdir()
    data = started.data.model_copy(update={"tokenizer": str(run / "tokenizer.json")})
    save_tokenizer_of(data, tmp_path / "started")
    RunStart(run / "checkpoints/step_00000000", started).keep_files(tmp_path / "started")
    for config in (load_config(edited / "config.yaml"), started):
        tokenizer = open_prompt_tokenizer(config)
        assert (tokenizer.encode("w9"), tokenizer.end_ids) == ([BOS, 10], {9, 10})


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        (
            "generation_config.json",
            '{"eos_token_id": "</s>"}',
            "eos_token_id is '</s>', it must be a token id or a list",
        ),
        ("generation_config.json", '{"eos_token_id": [2, true]}', "eos_token_id is [2, True], it must be a token id"),
        ("generation_config.json", '{"bos_token_id": [1]}', "bos_token_id is [1], it must be a token id"),
        ("generation_config.json", "[]", "is not a JSON object"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("tokenizer_config.json", '{"add_bos_token": true, "bos_token": 5}', "bos_token is 5, it must be the text of"),
    ],
)
def test_files_that_cannot_be_followed_are_not_imported(
    file: str, content: str, sentence: str, theirs: Path, tmp_path: Path
) -> None:
    kept = (theirs / file).read_text()
    (theirs / file).write_text(content)
    refused = invoke("convert", "import", theirs, tmp_path / "run")
    (theirs / file).write_text(kept)
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"error: {theirs / file}")
    assert sentence in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation") / "theirs"
    save_peer(folder)
    return folder
