"""Builds the report on the experts of a run, on one process: reads the run's config, metrics.jsonl and newest
checkpoint, and routes its held-out text, or a given text, through the model. The report becomes an HTML page (page.py)
and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from expert_parallel.checkpoint.load import load_checkpoint
from expert_parallel.data.open import open_data
from expert_parallel.data.sampler import Sequences
from expert_parallel.data.tokenizer import Tokenizer
from expert_parallel.model.parallelize import build_model
from expert_parallel.moe.types import Outcome
from expert_parallel.report.loads import Loads, read_loads
from expert_parallel.report.sample import Sample, run_sample, split_windows
from expert_parallel.report.specialization import ExpertStats, compute_expert_stats
from expert_parallel.report.token_text import CHARACTER_CLASSES, TokenText, character_classes, display_name, token_texts
from expert_parallel.report.verdict import Verdict, read_verdict
from expert_parallel.runtime.process import Runtime, UserError
from expert_parallel.training.config import DTYPES, Config
from expert_parallel.training.generate import load_run_config, open_run_tokenizer
from expert_parallel.training.setup import data_requirements


@dataclass(frozen=True, eq=False)
class ExpertsReport:
    """Holds everything that the page shows.

    name: of the run. step: of the checkpoint. verdict: on the health of the run. source: a description of where the
    sample's text comes from. token_texts: for each sequence of the sample, the texts of its tokens. expert_stats: by
    MoE block. names: display names, by token id, of the tokens that `expert_stats` lists."""

    name: str
    config: Config
    step: int
    verdict: Verdict
    loads: Loads
    source: str
    sample: Sample
    token_texts: list[list[TokenText]]
    expert_stats: dict[int, ExpertStats]
    names: dict[int, str]

    @property
    def num_experts(self) -> int:
        assert self.config.model.moe is not None
        return self.config.model.moe.num_experts

    @property
    def blocks(self) -> list[int]:
        return self.config.model.moe_layers


@dataclass(frozen=True, eq=False)
class SampleText:
    """Holds sequences to run through the model. groups: each of sequences of one length, S at most
    training.sequence_length. source: a description."""

    groups: list[Sequences]
    source: str


def build_report(
    run: Path, overrides: Sequence[str], runtime: Runtime, text: Path | None, sequences: int | None
) -> ExpertsReport:
    """Builds the report of the run in folder `run`.

    text: a file to use instead of held-out text. sequences: maximum number of sequences; None: as in evaluation, or the
    whole file. Raises ValueError for a run without experts, training steps or a checkpoint, and for missing data;
    UserError for a broken checkpoint or several ranks."""
    if runtime.world_size > 1:
        raise UserError(f"experts works on one process, {runtime.world_size} were started")
    config = load_run_config(run, overrides)
    moe, blocks = config.model.moe, config.model.moe_layers
    if moe is None:
        raise ValueError(f"{run} is a run of a dense model (model.moe is not set): it has no experts")
    loads = read_loads(run / "metrics.jsonl", blocks, moe.num_experts)
    tokenizer = open_run_tokenizer(config)
    source = _held_out(config, sequences) if text is None else _text(config, tokenizer, text, sequences)

    model = build_model(config.model, dtype=DTYPES[config.training.dtype], device=runtime.device, seed=None)
    checkpoint = load_checkpoint(run / "checkpoints", model, None, runtime)
    batch_size = config.training.global_batch // config.training.micro_steps
    sample = run_sample(model, source.groups, batch_size=batch_size, seed=config.seed)

    found = [token_texts(tokenizer, sequence.tolist()) for sequence in sample.sequences]
    tokens_T = torch.cat(sample.sequences)
    class_T = torch.tensor([number for sequence in found for number in character_classes(sequence)])
    sizes = (moe.num_experts, len(CHARACTER_CLASSES))
    expert_stats = {
        block: compute_expert_stats(tokens_T, class_T, routing.ids_TK, routing.computed_TK, routing.first_T, sizes)
        for block, routing in sample.routing.items()
    }
    named = {
        top_tokens.token
        for of_block in expert_stats.values()
        for of_expert in of_block.top_tokens
        for top_tokens in of_expert
    }
    return ExpertsReport(
        name=run.resolve().name,
        config=config,
        step=checkpoint.step,
        verdict=read_verdict(run / "metrics.jsonl", config),
        loads=loads,
        source=source.source,
        sample=sample,
        token_texts=found,
        expert_stats=expert_stats,
        names={token: display_name(tokenizer, token) for token in sorted(named)},
    )


def _held_out(config: Config, sequences: int | None) -> SampleText:
    """Returns the sequences of evaluation, or the given number of them."""
    requirements = data_requirements(config)
    data = open_data(
        config.data, replace(requirements, held_out_sequences=sequences or requirements.held_out_sequences)
    )
    described = "; ".join(line.strip() for line in data.description.splitlines())
    return SampleText([data.held_out], f"the held-out part of {described}")


def _text(config: Config, tokenizer: Tokenizer, path: Path, sequences: int | None) -> SampleText:
    """Tokenizes a file, and splits it into windows. Raises ValueError for text that the model cannot process."""
    try:
        tokens = torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8")), dtype=torch.int64)
    except UnicodeDecodeError as error:
        raise ValueError(f"--text: {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if len(tokens) < 2:
        raise ValueError(f"--text: {path} has {len(tokens)} tokens, 2 are needed: one to show, and the one after it")
    if int(tokens.max()) >= config.model.vocab_size:
        raise ValueError(f"--text: {path} has token {int(tokens.max())}, model.vocab_size is {config.model.vocab_size}")
    windows = split_windows(tokens, config.training.sequence_length)[:sequences]
    return SampleText([Sequences(torch.stack(list(group))) for _, group in groupby(windows, key=len)], str(path))


def as_json(report: ExpertsReport) -> str:
    """Returns the page's numbers as JSON. Objects have the indices of MoE blocks as keys; lists are in the order of
    experts or of the sample's tokens."""
    loads, sample = report.loads, report.sample
    tree: dict[str, Any] = {
        "run": report.name,
        "step": report.step,
        "num_experts": report.num_experts,
        "health": asdict(report.verdict),
        "loads": {
            "first_steps": loads.first_steps,
            "last_steps": loads.last_steps,
            "blocks": {
                block: {
                    "share": loads.share[block].tolist(),
                    "dropped_share": loads.dropped_share[block].tolist(),
                    "load_cv": loads.load_cv[block].tolist(),
                }
                for block in report.blocks
            },
        },
        "sample": {
            "source": report.source,
            "loss": sample.loss,
            "sequences": [sequence.tolist() for sequence in sample.sequences],
            "fates": {int(reason): reason.name.lower() for reason in Outcome},
            "blocks": {
                block: {
                    "experts": routing.ids_TK.tolist(),
                    "weights": [[round(weight, 6) for weight in row] for row in routing.weights_TK.tolist()],
                    "fate": routing.outcome_TK.tolist(),
                    "first": routing.first_T.tolist(),
                }
                for block, routing in sample.routing.items()
            },
        },
        "habits": {
            "classes": CHARACTER_CLASSES,
            "names": report.names,
            "blocks": {block: _stats_tree(expert_stats) for block, expert_stats in report.expert_stats.items()},
        },
    }
    return json.dumps(_without_nan(tree))


def _stats_tree(expert_stats: ExpertStats) -> dict[str, Any]:
    """Names every key, since those of the file stay when an attribute gets another name."""
    return {
        "count": expert_stats.count,
        "first_count": expert_stats.first_count,
        "liked": [[asdict(token) for token in of_expert] for of_expert in expert_stats.top_tokens],
        "class_share": expert_stats.class_share,
        "overall_class_share": expert_stats.overall_class_share,
        "specialisation": asdict(expert_stats.specialization),
    }


def _without_nan(tree: Any) -> Any:
    """Replaces NaN by None, since JSON has no NaN."""
    if isinstance(tree, dict):
        return {key: _without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and tree != tree else tree
