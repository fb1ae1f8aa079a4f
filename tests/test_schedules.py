"""Learning-rate schedules, by hand."""

import math

import pytest
from pydantic import TypeAdapter, ValidationError

from expert_parallel.training.optim import OptimizerConfig, ScheduleConfig, learning_rate

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
