"""Learning-rate schedules and the optimizer's settings, by hand."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from expert_parallel.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate

SCHEDULE: TypeAdapter[ScheduleConfig] = TypeAdapter(ScheduleConfig)
PEAK = 0.8


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # warm-up 1/4 ... 4/4, then half a cosine from the peak towards a tenth, which it would have after the last step
        (
            {"kind": "cosine", "warmup_steps": 4, "final_fraction": 0.1},
            {0: 0.2, 3: 0.8, 4: 0.8, 8: 0.8 * (0.1 + 0.9 * 0.5), 12: 0.8 * 0.1},
        ),
        ({"warmup_steps": 4, "final_fraction": 0.1}, {8: 0.8 * (0.1 + 0.9 * 0.5)}),  # cosine is what there is otherwise
        ({"kind": "inverse_sqrt", "warmup_steps": 4}, {0: 0.2, 3: 0.8, 15: 0.4, 4: 0.8 * math.sqrt(4 / 5)}),
        ({"kind": "constant", "warmup_steps": 4}, {0: 0.2, 3: 0.8, 4: 0.8, 12: 0.8}),
        ({"kind": "constant", "warmup_steps": 0}, {0: 0.8}),
        # the peak until step 8 of 12, then a line, which would be at its end after the last step
        ({"kind": "wsd", "warmup_steps": 4, "decay_steps": 4}, {0: 0.2, 4: 0.8, 8: 0.8, 9: 0.6, 11: 0.2, 12: 0.0}),
        (
            {"kind": "wsd", "warmup_steps": 0, "decay_steps": 4, "final_fraction": 0.5},
            {8: 0.8, 10: 0.6, 12: 0.4, 99: 0.4},
        ),
        (
            {"kind": "wsd", "warmup_steps": 8, "decay_steps": 99},
            {7: 0.8, 8: 0.8, 10: 0.4, 12: 0.0},
        ),  # after the warm-up
    ],
)
def test_rates(schedule: dict[str, object], rates: dict[int, float]) -> None:
    config, optimizer = SCHEDULE.validate_python(schedule), OptimizerConfig(learning_rate=PEAK)
    found = {step: learning_rate(optimizer, config, step, 12) for step in rates}
    assert found == pytest.approx(rates)


@pytest.mark.parametrize("kind", ["inverse_sqrt", "constant"])
def test_a_short_run_is_the_beginning_of_a_long_one(kind: str) -> None:
    config = SCHEDULE.validate_python({"kind": kind, "warmup_steps": 4})
    short, long = ([learning_rate(OptimizerConfig(), config, step, total) for step in range(10)] for total in (10, 999))
    assert short == long


def test_inverse_sqrt_needs_a_warm_up() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        SCHEDULE.validate_python({"kind": "inverse_sqrt", "warmup_steps": 0})


def test_each_setting_of_adamw_by_hand() -> None:
    """Two steps of one weight and one bias, with gradients 1 and 3, and every setting different."""
    model = torch.nn.Linear(1, 1).double()
    for parameter in model.parameters():
        parameter.data.fill_(2.0)
    config = OptimizerConfig(learning_rate=0.5, betas=[0.5, 0.75], eps=0.25, weight_decay=0.125)
    optimizer = build_optimizer(config, model)
    for gradient in (1.0, 3.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    # First step: moments 0.5 and 0.25, corrected 1 and 1. Second: 1.75 and 2.4375, corrected by 0.75 and 0.4375.
    first, second = 0.5 * 1 / (1 + 0.25), 0.5 * (1.75 / 0.75) / (math.sqrt(2.4375 / 0.4375) + 0.25)
    keeps = 1 - 0.5 * 0.125  # of the weight, in each step
    assert model.weight.item() == pytest.approx((2 * keeps - first) * keeps - second, rel=1e-12)
    assert model.bias.item() == pytest.approx(2 - first - second, rel=1e-12)
