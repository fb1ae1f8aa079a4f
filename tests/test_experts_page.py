"""`expert-parallel experts`: its numbers against slow counts, a page that holds all it needs and escapes what it shows,
and what it refuses."""

import argparse
import json
import math
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from expert_parallel.checkpoint.load import load_checkpoint
from expert_parallel.cli.app import app
from expert_parallel.data.open import open_data
from expert_parallel.data.tokenizer import ByteTokenizer, open_tokenizer, train_tokenizer
from expert_parallel.model.parallelize import build_model
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.types import Outcome
from expert_parallel.report.loads import COLUMNS, read_loads
from expert_parallel.report.sample import SampleRouting, split_windows
from expert_parallel.report.specialization import compute_expert_stats, mutual_information, specialization
from expert_parallel.report.style import HEAT, STEPS_FROM_FAIR, heat, step_ratio
from expert_parallel.report.token_text import CHARACTER_CLASSES, character_classes, display_name, token_texts
from expert_parallel.training.config import load_config
from expert_parallel.training.setup import data_requirements
from tests.ranks import run_ranks
from tests.test_checkpoint import run_training

STEPS, EXPERTS, CHOICES, LENGTH = 6, 4, 2, 32
BLOCKS = [1, 2]  # block 0 is dense


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Tight capacity over all tokens: the same drops on any layout."""
    moe = {
        "num_experts": EXPERTS,
        "router": {"k": CHOICES},
        "capacity": {"kind": "factor", "train": 1.0, "eval": 0.8, "minimum": 0, "scope": "global"},
        "experts": {"hidden": 8},
    }
    return {
        "run": {"folder": str(folder)},
        "model": {
            "num_layers": 3,
            "d_model": 16,
            "init_std": 0.3,
            "attention": {"num_heads": 2, "head_size": 8},
            "ffn": {"hidden": 16},
            "moe": moe,
            "moe_blocks": {"kind": "list", "indices": BLOCKS},
        },
        "parallel": {"ep": 2},
        "training": {"steps": STEPS, "global_batch": 4, "sequence_length": LENGTH, "dtype": "float64"},
        "evaluation": {"sequences": 10},  # batches of 4, 4, 2
        "data": {"kind": "files", "paths": [argparse.__file__]},
        **changes,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on 2 ranks."""
    folder = tmp_path_factory.mktemp("experts") / "run <b>"
    assert run_ranks(2, run_training, 2, settings(folder)) == ["", ""]
    return folder


def experts(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["experts", *map(str, arguments)])


def made(run: Path, folder: Path, *arguments: str | Path) -> tuple[str, dict[str, Any]]:
    page, numbers = folder / "page.html", folder / "numbers.json"
    result = experts(run, "--out", page, "--json", numbers, *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout == f"wrote {page} and {numbers}\n"
    return page.read_text(), json.loads(numbers.read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def both(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    return made(run, tmp_path_factory.mktemp("made"))


def slow_routing(run: Path) -> dict[int, list[list[tuple[int, float, bool]]]]:
    """By block, for each token: (expert, weight, computed) of each choice: softmax, the k best, and queues in which
    first choices come before second ones."""
    config = load_config(run / "config.yaml")
    model = build_model(config.model, dtype=torch.float64, seed=0).eval()
    load_checkpoint(run, model)
    inputs: dict[int, Tensor] = {}
    for block in BLOCKS:
        moe = model.blocks[block].moe  # type: ignore[union-attr]
        moe.register_forward_pre_hook(lambda _, given, block=block: inputs.update({block: given[0]}))  # type: ignore[union-attr]
    found: dict[int, list[list[tuple[int, float, bool]]]] = {block: [] for block in BLOCKS}
    for rows in open_data(config.data, data_requirements(config)).held_out.split(4):
        with torch.no_grad():
            model(rows.tokens[:, :-1], StepContext(sequence_index_B=torch.arange(len(rows))))
        for block in BLOCKS:
            weight = model.blocks[block].moe.router.weight.detach()  # type: ignore[union-attr]
            probabilities = [(token @ weight.T).softmax(-1).tolist() for token in inputs[block].flatten(0, 1)]
            best = [sorted(range(EXPERTS), key=lambda e, p=p: -p[e])[:CHOICES] for p in probabilities]  # type: ignore[misc]
            room = Counter({e: math.ceil(0.8 * len(best) * CHOICES / EXPERTS) for e in range(EXPERTS)})
            computed = {}
            for k in range(CHOICES):
                for token, chosen in enumerate(best):
                    computed[token, k] = room[chosen[k]] > 0
                    room[chosen[k]] -= 1
            for token, chosen in enumerate(best):
                whole = sum(probabilities[token][e] for e in chosen)
                rows_of = [(e, probabilities[token][e] / whole, computed[token, k]) for k, e in enumerate(chosen)]
                found[block].append(rows_of)
    return found


def test_routing_is_that_of_a_slow_model(run: Path, both: tuple[str, dict[str, Any]]) -> None:
    _, numbers = both
    slow = slow_routing(run)
    for block in BLOCKS:
        ours = numbers["sample"]["blocks"][str(block)]
        computed = [[fate <= Outcome.REROUTED for fate in row] for row in ours["fate"]]
        assert ours["experts"] == [[e for e, _, _ in row] for row in slow[block]]
        assert computed == [[c for _, _, c in row] for row in slow[block]]
        expected = [[w if c else 0 for _, w, c in row] for row in slow[block]]
        torch.testing.assert_close(torch.tensor(ours["weights"]), torch.tensor(expected), rtol=0, atol=1e-6)
        first = [next((e for e, _, c in row if c), -1) for row in slow[block]]
        assert ours["first"] == first
        assert 0.05 < sum(row.count(False) for row in computed) / (CHOICES * len(computed)) < 0.5
        assert -1 in first


def test_the_sample_is_that_of_evaluation(run: Path, both: tuple[str, dict[str, Any]]) -> None:
    """Its loss and loads are those that the run logged on 2 ranks at its end."""
    _, numbers = both
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert numbers["sample"]["loss"] == pytest.approx(last["eval/loss"], rel=1e-9)
    assert [len(sequence) for sequence in numbers["sample"]["sequences"]] == [LENGTH] * 10
    for block in BLOCKS:
        count = numbers["habits"]["blocks"][str(block)]["count"]
        logged = [last[f"eval/moe/layer_{block}/load/{e}"] for e in range(EXPERTS)]
        assert [c / sum(count) for c in count] == pytest.approx(logged)


def test_habits_are_those_of_a_slow_count(both: tuple[str, dict[str, Any]]) -> None:
    page, numbers = both
    text = [token for sequence in numbers["sample"]["sequences"] for token in sequence]
    for block in BLOCKS:
        routing, expert_stats = (numbers[part]["blocks"][str(block)] for part in ("sample", "habits"))
        pairs = [
            (token, expert)
            for token, chosen, fates in zip(text, routing["experts"], routing["fate"], strict=True)
            for expert, fate in zip(chosen, fates, strict=True)
            if fate == Outcome.KEPT
        ]
        both_of, token_of = Counter(pairs), Counter(token for token, _ in pairs)
        expert_of = Counter(expert for _, expert in pairs)
        assert expert_stats["count"] == [expert_of[e] for e in range(EXPERTS)]
        for expert in range(EXPERTS):
            lift = {
                token: (count / expert_of[expert]) / (token_of[token] / len(pairs))
                for (token, e), count in both_of.items()
                if e == expert and count >= 4
            }
            gain = {token: both_of[token, expert] * math.log(value) for token, value in lift.items() if value > 1}
            best = sorted(gain, key=lambda token: -gain[token])[:8]
            top_tokens = expert_stats["liked"][expert]
            assert [gain[one["token"]] for one in top_tokens] == pytest.approx([gain[token] for token in best])
            for one in top_tokens:
                assert one["count"] == both_of[one["token"], expert]
                assert one["share"] == pytest.approx(one["count"] / expert_of[expert])
                assert one["lift"] == pytest.approx(lift[one["token"]])
            digits = sum(count for (token, e), count in both_of.items() if e == expert and chr(token).isdigit())
            share = expert_stats["class_share"][expert][CHARACTER_CLASSES.index("digits")]
            assert share == pytest.approx(digits / expert_of[expert])
        assert sum(len(top_tokens) for top_tokens in expert_stats["liked"]) > EXPERTS, "something to compare"

        served = [(token, first) for token, first in zip(text, routing["first"], strict=True) if first >= 0]
        joint, left, right = Counter(served), Counter(t for t, _ in served), Counter(f for _, f in served)
        size = len(served)
        bits = sum(c / size * math.log2(c * size / (left[t] * right[f])) for (t, f), c in joint.items())
        assert expert_stats["specialisation"]["bits"] == pytest.approx(bits)
        adjusted = expert_stats["specialisation"]["adjusted"]
        assert f"<b>{adjusted:.0%}</b>" in page


def test_loads_are_the_means_of_what_was_logged(run: Path, both: tuple[str, dict[str, Any]]) -> None:
    """So few steps have a column each."""
    loads = both[1]["loads"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    assert loads["first_steps"] == loads["last_steps"] == list(range(1, STEPS + 1))
    for block in BLOCKS:
        for name in ("dropped_share", "load_cv"):
            logged = [record[f"moe/layer_{block}/{name}"] for record in records]
            assert loads["blocks"][str(block)][name] == pytest.approx(logged)
        logged = [[record[f"moe/layer_{block}/load/{e}"] for e in range(EXPERTS)] for record in records]
        assert loads["blocks"][str(block)]["share"] == [pytest.approx(row) for row in logged]


def record(step: int, load: float) -> str:
    names = {"moe/layer_3/load/0": load, "moe/layer_3/load/1": 1 - load, "moe/layer_3/load_cv": load / 2}
    return json.dumps({"step": step, "train/loss": 1.0, **names, "moe/layer_3/dropped_share": 0.1}) + "\n"


def test_many_steps_share_columns(tmp_path: Path) -> None:
    """250 steps from 11 on, of which the second column's are missing; half a line at the end is left out."""
    path = tmp_path / "metrics.jsonl"
    steps = [step for step in range(11, 261) if step not in (14, 15)]
    path.write_text("".join(record(step, step / 1000) for step in steps) + record(300, 0.9)[:-9])
    loads = read_loads(path, [3], 2)
    assert len(loads.first_steps) == COLUMNS
    assert (loads.first_steps[0], loads.last_steps[-1]) == (11, 260)
    assert loads.first_steps[1:] == [last + 1 for last in loads.last_steps[:-1]]
    assert (loads.first_steps[1], loads.last_steps[1]) == (14, 15)
    for column, (first, last) in enumerate(zip(loads.first_steps, loads.last_steps, strict=True)):
        inside = [step / 1000 for step in steps if first <= step <= last]
        if column == 1:
            assert loads.share[3][column].tolist() == pytest.approx([math.nan] * 2, nan_ok=True)
            continue
        mean = sum(inside) / len(inside)
        assert loads.share[3][column].tolist() == pytest.approx([mean, 1 - mean])
        assert loads.load_cv[3][column] == pytest.approx(mean / 2)


class Page(HTMLParser):
    """Fails where a tag is not closed; keeps tags with their attributes, and each token's text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tokens: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if "pre" in self.open and tag == "span":
            self.tokens.append(("", dict(attributes)))

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open and "i" not in self.open:  # i: marks that make blanks visible
            assert self.open[-1] == "span"
            text, attributes = self.tokens[-1]
            self.tokens[-1] = (text + data, attributes)


def test_the_page_needs_nothing_else(both: tuple[str, dict[str, Any]]) -> None:
    page = Page(both[0])
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "b>"}
    assert not {name for _, attributes in page.tags for name in attributes} & {"src", "href", "xlink:href", "srcset"}
    assert not {name for _, attributes in page.tags for name in attributes if name.startswith("on")}
    style = both[0][both[0].index("<style>") : both[0].index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "run &lt;b&gt;" in both[0]  # the run's name


def test_the_text_and_its_marks(both: tuple[str, dict[str, Any]]) -> None:
    """What is shown is the text; colours are those of first experts; what was dropped is marked."""
    page, numbers = Page(both[0]), both[1]
    text = [token for sequence in numbers["sample"]["sequences"] for token in sequence]
    assert "".join(shown for shown, _ in page.tokens) == bytes(text).decode()
    for place, block in enumerate(BLOCKS):
        routing, expert_stats = (numbers[part]["blocks"][str(block)] for part in ("sample", "habits"))
        order = sorted(range(EXPERTS), key=lambda e: -expert_stats["first_count"][e])
        for number, (_, attributes) in enumerate(page.tokens):
            first, fates = routing["first"][number], routing["fate"][number]
            expected = {f"b{place}-none"} if first < 0 else {f"b{place}-{order.index(first)}"}
            expected |= {f"b{place}-part"} if first >= 0 and Outcome.DROPPED_CAPACITY in fates else set()
            assert {name for name in attributes["class"].split() if name.startswith(f"b{place}-")} == expected
            line = attributes["title"].split("\n")[place]
            assert line.startswith(f"block {block}: ")
            assert line.count("dropped") == fates.count(Outcome.DROPPED_CAPACITY)
            if first >= 0:
                assert line.startswith(f"block {block}: expert {first} {max(routing['weights'][number]):.2f}")
    assert any("b0-none" in attributes["class"] for _, attributes in page.tokens)
    assert any("b0-part" in attributes["class"] for _, attributes in page.tokens)


def test_a_text_of_ones_own_is_escaped(run: Path, tmp_path: Path) -> None:
    """And bytes of one character are one piece; the last token is a target alone."""
    text = "<script>alert('é & 日本')</script>\n\tif \"x\": 😀\n" * 3 + "."
    (tmp_path / "text.txt").write_text(text)
    page, numbers = made(run, tmp_path, "--text", tmp_path / "text.txt")
    assert "<script" not in page
    assert "<<" not in page, "a token that is < alone"
    assert ">&lt;</span>" in page
    parsed = Page(page)
    lengths = [len(sequence) for sequence in numbers["sample"]["sequences"]]
    size = len(text.encode()) - 1
    assert lengths == [LENGTH] * (size // LENGTH) + [size % LENGTH]
    assert bytes(token for sequence in numbers["sample"]["sequences"] for token in sequence) == text.encode()[:-1]
    windows = [bytes(sequence).decode(errors="replace") for sequence in numbers["sample"]["sequences"]]
    assert "".join(shown for shown, _ in parsed.tokens) == "".join(windows)
    attributes = next(attributes for shown, attributes in parsed.tokens if shown == "😀")
    assert len(attributes["title"].split("\n")) == 4 * len(BLOCKS)


def test_fewer_sequences(run: Path, tmp_path: Path) -> None:
    _, numbers = made(run, tmp_path, "--sequences", "3")
    assert len(numbers["sample"]["sequences"]) == 3
    assert "experts.html" in experts(run, "--sequences", "1").stdout
    assert (run / "experts.html").is_file()


# ------------------------------------------------------------------------------------------------------- pieces by hand


def test_first_is_the_heaviest_that_computed() -> None:
    ids_TK = torch.tensor([[3, 1], [2, 0], [1, 2], [0, 3]])
    kept, rerouted, dropped, no = Outcome.KEPT, Outcome.REROUTED, Outcome.DROPPED_CAPACITY, Outcome.NOT_ROUTED
    outcome_TK = torch.tensor([[kept, kept], [dropped, rerouted], [dropped, dropped], [kept, no]], dtype=torch.uint8)
    weights_TK = torch.tensor([[0.4, 0.6], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    routing = SampleRouting(ids_TK, weights_TK, outcome_TK)
    assert routing.first_T.tolist() == [1, 0, -1, 0]
    assert routing.dropped_TK.any(1).tolist() == [False, True, True, False]


def test_windows_overlap_by_one() -> None:
    found = [window.tolist() for window in split_windows(torch.arange(8), 3)]
    assert found == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    assert [window.tolist() for window in split_windows(torch.arange(7), 3)] == found[:2]


def test_mutual_information_by_hand() -> None:
    a, b = torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 7, 7])
    assert mutual_information(a, b) == pytest.approx(1)
    assert mutual_information(a, torch.tensor([5, 7, 5, 7])) == pytest.approx(0)
    # p = (1/2, 1/4, 1/4) over (0,5), (1,5), (1,7): H(a) = 1, H(b) = 0.8113, H(a, b) = 1.5
    assert mutual_information(a, torch.tensor([5, 5, 5, 7])) == pytest.approx(1 + 0.811278 - 1.5, abs=1e-6)


def test_specialisation_is_adjusted_for_chance() -> None:
    """Half of the tokens stand in the sample once: unadjusted, experts drawn by lot would look like 60%."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([torch.arange(1000), torch.randint(1000, 1300, (1000,), generator=generator)])
    by_lot = specialization(tokens, torch.randint(8, (2000,), generator=generator))
    assert by_lot.bits / by_lot.entropy_bits > 0.5
    assert by_lot.adjusted < 0.03
    by_token = specialization(tokens, tokens % 8)
    assert by_token.adjusted == pytest.approx(1)
    assert by_token.bits == pytest.approx(by_token.entropy_bits)
    mixed = specialization(tokens, torch.where(torch.rand(2000, generator=generator) < 0.5, tokens % 8, 0))
    assert 0.1 < mixed.adjusted < 0.9
    assert specialization(tokens, torch.zeros_like(tokens)).adjusted == 0, "one expert for all: nothing to decide"


def test_a_block_that_computes_nothing() -> None:
    none = torch.zeros(3, 2, dtype=torch.bool)
    ids_TK, text = torch.zeros(3, 2, dtype=torch.int64), torch.tensor([1, 2, 3])
    expert_stats = compute_expert_stats(text, torch.zeros_like(text), ids_TK, none, torch.full((3,), -1), (4, 2))
    assert expert_stats.count == [0] * 4
    assert expert_stats.top_tokens == [[]] * 4
    assert expert_stats.specialization.adjusted == 0


def kinds(text: str) -> list[str]:
    return [
        CHARACTER_CLASSES[number] for number in character_classes(token_texts(ByteTokenizer(), list(text.encode())))
    ]


def test_kinds_of_characters() -> None:
    assert kinds("a B\n \t") == ["letters", "spaces", "upper case", "newlines", "indentation", "indentation"]
    assert kinds("  7") == ["spaces", "spaces", "digits"], "a sequence may begin anywhere in a line"
    assert kinds("+\0") == ["punctuation", "other"]
    assert kinds("É日") == ["upper case"] * 2 + ["letters"] * 3


def test_pieces_of_a_trained_tokenizer(tmp_path: Path) -> None:
    text = "the cat and\n    the dog naïve 日本 ünd 😀"
    train_tokenizer(["the cat and\n    the dog the the and"] * 5, 270, tmp_path / "tokenizer.json")
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text)
    found = token_texts(tokenizer, ids)
    assert "".join(piece.text for piece in found) == text
    assert sum(piece.num_tokens for piece in found) == len(ids)
    assert max(piece.num_tokens for piece in found) > 1 < max(len(piece.text) for piece in found)
    assert len(character_classes(found)) == len(ids)
    assert display_name(tokenizer, tokenizer.encode(" the")[0]) == "␣the"


def test_names_of_bytes() -> None:
    assert [display_name(ByteTokenizer(), byte) for byte in b"a \n\x01\xff"] == ["a", "␣", "↵", "\\x01", "#255"]


def test_half_a_character_at_the_end() -> None:
    found = token_texts(ByteTokenizer(), list("ab日".encode())[:-1])
    assert [(piece.text, piece.num_tokens) for piece in found] == [("a", 1), ("b", 1), ("\N{REPLACEMENT CHARACTER}", 2)]


def test_steps_of_the_scale() -> None:
    assert (heat(1.0), heat(0.0), heat(99.0)) == (STEPS_FROM_FAIR, 0, HEAT - 1)
    assert [heat(step_ratio(step)) for step in range(HEAT)] == list(range(HEAT))
    assert step_ratio(STEPS_FROM_FAIR + 4) == 2


# ------------------------------------------------------------------------------------------------------------- refusals


def refusal(*arguments: str | Path) -> str:
    result = experts(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("error: ").strip()


def copied(run: Path, folder: Path) -> Path:
    """Without its checkpoint."""
    (folder / "copy").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (folder / "copy" / name).write_text((run / name).read_text())
    return folder / "copy"


def test_what_has_nothing_to_show_is_refused(run: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").endswith(f"there is no run folder {tmp_path / 'nowhere'}")
    assert "config.yaml cannot be read" in refusal(tmp_path)
    copy = copied(run, tmp_path)
    assert refusal(copy) == f"there is no checkpoint {copy / 'checkpoints'}"
    (copy / "metrics.jsonl").write_text('{"step": 0, "tokens": 0, "eval/loss": 5.0}\n')
    assert "holds no step of training yet" in refusal(copy)
    (copy / "metrics.jsonl").write_text(record(1, 0.5))
    assert "step 1 has no moe/layer_1/load/0; the run's config.yaml has 2 MoE blocks of 4 experts" in refusal(copy)
    (copy / "metrics.jsonl").write_text("{]\n")
    assert "line 1 is not JSON" in refusal(copy)
    (copy / "metrics.jsonl").unlink()
    assert "there is no" in refusal(copy)
    assert "metrics.jsonl" in refusal(copy)
    assert not (copy / "experts.html").exists()


def test_a_dense_run_is_refused(tmp_path: Path) -> None:
    tree = settings(tmp_path / "dense", parallel={})
    tree["model"] |= {"moe": None, "moe_blocks": {"kind": "all"}}
    tree["training"]["steps"] = 1
    assert run_ranks(1, run_training, 1, tree) == [""]
    assert "is a run of a dense model (model.moe is not set)" in refusal(tmp_path / "dense")


def test_texts_that_cannot_be_shown_are_refused(run: Path, tmp_path: Path) -> None:
    assert "No such file" in refusal(run, "--text", tmp_path / "nowhere.txt")
    (tmp_path / "short.txt").write_text("a")
    assert "has 1 tokens, 2 are needed" in refusal(run, "--text", tmp_path / "short.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9!")
    assert "is not UTF-8" in refusal(run, "--text", tmp_path / "latin.txt")
