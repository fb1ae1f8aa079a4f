"""Every sparse family of transformers is imported, or refused with the part that is missing; the README lists them."""

import pytest
import transformers
from typer.testing import CliRunner

from expert_parallel.cli.app import app
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.unsupported import UNSUPPORTED, describe_unsupported, missing
from tests.family_table import BEGINS, ENDS, README

DENSE = {"llama", "qwen2", "qwen3"}
REMOTE = {"kimi_k2"}  # its code is in the folders alone
SPARSE = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok", "moe_topk")


def sparse_families() -> set[str]:
    """The model types whose config class has a number of experts, and DBRX, which has it in a part of its own."""
    found = {"dbrx"}
    for kind, config_class in transformers.CONFIG_MAPPING.items():
        names = {*getattr(config_class, "__dataclass_fields__", {}), *getattr(config_class, "attribute_map", {})}
        if names.intersection(SPARSE):
            found.add(kind)
    return found


def test_every_sparse_family_has_its_state() -> None:
    assert not FAMILIES.keys() & UNSUPPORTED.keys()
    assert sparse_families() == (FAMILIES.keys() - DENSE - REMOTE) | UNSUPPORTED.keys()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"model_type": "qwen3_next"},
            "model_type is 'qwen3_next': its linear attention (a gated delta rule) is not here",
        ),
        (
            {"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text"}},
            "model_type is 'qwen3_5_moe', a model that also reads images or sound; of its model of text "
            "(qwen3_5_moe_text), its linear attention (a gated delta rule) is not here",
        ),
        (
            {"model_type": "some_vl", "text_config": {"model_type": "mixtral"}},
            "model_type is 'some_vl', a model that also reads images or sound: save its model of text (mixtral) alone "
            "(in transformers: AutoModelForCausalLM.from_pretrained, then save_pretrained), then import that",
        ),
        ({"model_type": "mamba"}, "model_type is 'mamba', it must be one of llama, "),
        (
            {"model_type": ["mixtral"], "text_config": {"model_type": {}}},
            "model_type is ['mixtral'], it must be one of",
        ),
    ],
)
def test_a_refusal_names_what_is_missing(config: dict[str, object], sentence: str) -> None:
    assert describe_unsupported(config, list(FAMILIES)).startswith(sentence)


def test_the_command_and_the_readme_list_all_of_them() -> None:
    printed = CliRunner().invoke(app, ["convert", "families"]).stdout.splitlines()
    assert [line.split()[0] for line in printed] == [*sorted(FAMILIES), *sorted(UNSUPPORTED)]
    assert max(map(len, printed)) <= 120
    table = README.read_text().split(BEGINS)[1].split(ENDS)[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    equal = [[f" `{name}` ", " imports and equal "] for name in sorted(FAMILIES.keys() - DENSE)]
    assert rows == [*equal, *([f" `{name}` ", f" refused: {missing(name)} "] for name in sorted(UNSUPPORTED))]
