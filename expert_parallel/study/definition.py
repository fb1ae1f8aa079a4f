"""Defines a study: its settings, and the runs that follow from them."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from expert_parallel.config import load_tree, read_settings
from expert_parallel.model.config import ModelConfig
from expert_parallel.moe.config import merge
from expert_parallel.settings import MAX_SEED, PathText, Settings, TreeOf, use_own_names
from expert_parallel.training.config import Config, read_config
from expert_parallel.training.optim import CosineConfig, WSDConfig

Rate = Annotated[float, Field(gt=0)]


class VariantConfig(Settings):
    """Describes a variant of a study: what it changes in the base's model."""

    model: Annotated[dict[str, Any], BeforeValidator(partial(use_own_names, [ModelConfig]))] = Field(
        default_factory=dict
    )
    """Sets the `model` settings in which the variant differs from `base.model`."""
    claim: str = ""
    """Quotes what the variant's paper claims, for the table of results."""


class StudyConfig(Settings):
    """Describes a study, which compares variants of a model: each tries all learning rates, and continues with the best
    one."""

    folder: PathText
    """Sets the folder of the study's runs and results."""
    base: Annotated[dict[str, Any], BeforeValidator(partial(use_own_names, [Config])), TreeOf(Config)]
    """Sets the settings that all runs share: those of a run without its folder, seed and learning rate."""
    reference: str
    """Names the variant whose loss the others have to reach."""
    variants: dict[str, VariantConfig] = Field(min_length=2)
    """Maps the name of each variant to its changes."""
    learning_rates: list[Rate] = Field(min_length=1)
    """Lists the learning rates that each variant tries with the first seed; the one with the lowest held-out loss
    continues with all seeds."""
    trial_steps: int = Field(ge=1)
    """Sets the number of steps of each learning rate's trial."""
    seeds: list[Annotated[int, Field(ge=0, le=MAX_SEED)]] = Field(min_length=1)
    """Lists the seeds of the full-length runs."""
    jobs: int = Field(default=1, ge=1)
    """Sets the number of runs at a time, each in a process of its own."""
    threads: int = Field(default=1, ge=1)
    """Sets the number of threads of each run."""

    @model_validator(mode="after")
    def _check_consistency(self) -> "StudyConfig":
        if self.reference not in self.variants:
            raise ValueError(f"reference is {self.reference!r}, it must be one of {', '.join(self.variants)}")
        for name, values in (("seeds", self.seeds), ("learning_rates", self.learning_rates)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} lists a value twice: {values}")
        for name in self.variants:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
                raise ValueError(
                    f"variants: {name!r} names a folder, so only letters, digits, '-', '_' and '.' may occur"
                )
        return self


# Settings of a run that the study sets -> why `base` must not.
STUDY_OWNED_SETTINGS = {
    "run.folder": "runs lie below the study's own folder",
    "seed": "the study has `seeds`",
    "training.optimizer.learning_rate": "the study has `learning_rates`",
    "checkpoint.start_from": "all variants begin anew",
}


@dataclass(frozen=True)
class StudyRun:
    """Describes one training run of a study. rate: learning rate. steps: number of steps to train. A trial and the
    full-length run that continues it share a folder."""

    variant: str
    rate: float
    seed: int
    steps: int
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    def __str__(self) -> str:
        return f"{self.variant}, learning rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """Holds a study's settings and what is trained. names: the variants to train, including the reference. steps:
    number of steps of a full-length run (trials are shorter)."""

    settings: StudyConfig
    names: list[str]
    steps: int

    @property
    def folder(self) -> Path:
        return Path(self.settings.folder)

    def run(self, variant: str, rate: float, seed: int, steps: int) -> StudyRun:
        """Returns a run of the variant with its config. rate: learning rate. Raises ValueError if the variant's
        settings are not valid."""
        folder = self.folder / variant / f"lr_{rate:g}" / f"seed_{seed}"
        own = {
            "run": {"folder": str(folder)},
            "seed": seed,
            "training": {"steps": steps, "optimizer": {"learning_rate": rate}},
        }
        return StudyRun(variant, rate, seed, steps, _config_of(self.settings, variant, own))

    def trials(self, variant: str) -> list[StudyRun]:
        """Returns the variant's trials: a run of `trial_steps` for each learning rate, with the first seed."""
        first = self.settings.seeds[0]
        return [self.run(variant, rate, first, self.settings.trial_steps) for rate in self.settings.learning_rates]

    def finals(self, variant: str, rate: float) -> list[StudyRun]:
        """Returns the variant's full-length runs at this learning rate, one for each seed."""
        return [self.run(variant, rate, seed, self.steps) for seed in self.settings.seeds]

    def all_runs(self) -> list[StudyRun]:
        """Returns a full-length run for each variant, learning rate and seed, although only one learning rate per
        variant is trained to the end."""
        return [
            run
            for name in self.settings.variants
            for rate in self.settings.learning_rates
            for run in self.finals(name, rate)
        ]


def _config_of(settings: StudyConfig, variant: str, own: dict[str, Any]) -> Config:
    tree = merge(merge(settings.base, {"model": settings.variants[variant].model}), own)
    return read_config(tree, f"base, with variants.{variant}")


def read_study(path: Path, overrides: list[str], only: list[str] | None) -> Study:
    """Reads a study's file. only: names of variants to train besides the reference; None: all. Raises ValueError for
    settings of the study or of a variant that are not valid."""
    settings = read_settings(StudyConfig, load_tree(path, overrides, StudyConfig), str(path))
    for name in only or ():
        if name not in settings.variants:
            raise ValueError(f"--only: there is no variant {name!r}, there are {', '.join(settings.variants)}")
    names = [name for name in settings.variants if only is None or name in only or name == settings.reference]
    for setting, whose in STUDY_OWNED_SETTINGS.items():
        if _has(settings.base, setting.split(".")):
            raise ValueError(f"{path}: base.{setting} is given, but {whose}")
    configs = [_config_of(settings, name, {"run": {"folder": settings.folder}}) for name in settings.variants]
    study = Study(settings, names, configs[0].training.steps)
    for config in configs:
        _check(config, study)
    return study


def _has(tree: Any, names: list[str]) -> bool:
    return not names or (isinstance(tree, dict) and names[0] in tree and _has(tree[names[0]], names[1:]))


def _check(config: Config, study: Study) -> None:
    training, every = config.training, config.evaluation.every
    if isinstance(training.schedule, CosineConfig | WSDConfig):
        raise ValueError(
            f"base.training.schedule.kind is {training.schedule.kind!r}, which depends on the number of steps: a trial "
            "would not be the beginning of the run that goes on from it; 'inverse_sqrt' and 'constant' do not"
        )
    for setting, steps in (("trial_steps", study.settings.trial_steps), ("base.training.steps", study.steps)):
        if steps % every:
            raise ValueError(f"{setting} ({steps}) must be a multiple of base.evaluation.every ({every})")
    if study.settings.trial_steps > study.steps:
        raise ValueError(f"trial_steps ({study.settings.trial_steps}) is more than base.training.steps ({study.steps})")
