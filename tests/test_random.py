"""Random numbers that are functions of their keys: uniform, normal and Gumbel; repeatable, whatever the batching."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expert_parallel.moe.context import StepContext, pass_seed
from expert_parallel.nn import random
from expert_parallel.nn.random import Stream, dropout, gumbel, mix, normal, uniform


def test_mix_depends_on_every_key_and_on_their_order() -> None:
    seeds = {mix(*keys) for keys in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (1, 2, 0), (0, 1, 2)]}
    assert len(seeds) == 10


@given(st.lists(st.integers(-(2**63), 2**64), max_size=5))
@settings(deadline=None, derandomize=True)
def test_mix_seeds_a_generator(keys: list[int]) -> None:
    seed = mix(*keys)
    assert 0 <= seed < 2**63
    torch.Generator().manual_seed(seed)


def test_mix_spreads_neighbours() -> None:
    """Steps 0, 1, 2, ... give seeds whose every bit is set about half the time."""
    seeds = [mix(7, step) for step in range(4096)]
    assert len(set(seeds)) == 4096
    for bit in range(63):
        share = sum(seed >> bit & 1 for seed in seeds) / 4096
        assert abs(share - 0.5) < 0.05, bit  # six standard deviations


def test_uniform_has_the_moments_of_a_uniform_distribution() -> None:
    numbers = uniform(3, torch.arange(2000), width=50)
    assert numbers.dtype == torch.float64
    assert numbers.shape == (2000, 50)
    assert bool((numbers >= 0).all())
    assert bool((numbers < 1).all())
    deviation = 1 / math.sqrt(12 * numbers.numel())
    assert abs(float(numbers.mean()) - 1 / 2) < 5 * deviation
    assert abs(float(numbers.square().mean()) - 1 / 3) < 5 * deviation
    shares = torch.histc(numbers, bins=20, min=0, max=1) / numbers.numel()
    assert float((shares - 0.05).abs().max()) < 0.005


def test_uniform_numbers_do_not_follow_each_other() -> None:
    """No correlation between neighbours in a row, in a column, and under neighbouring seeds."""
    numbers = uniform(3, torch.arange(500), width=100) - 0.5
    other = uniform(4, torch.arange(500), width=100) - 0.5
    pairs = [(numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1]), (numbers, other)]
    for left, right in pairs:
        assert abs(float((left * right).mean()) * 12) < 0.03  # standard deviation 0.0045


def test_uniform_is_a_function_of_seed_row_and_column_alone() -> None:
    rows = torch.tensor([5, 0, 7, 5, 1 << 40])
    whole = uniform(11, rows, width=6)
    for row, numbers in zip(rows.tolist(), whole, strict=True):
        assert torch.equal(uniform(11, torch.tensor([row]), width=6)[0], numbers)  # one at a time
        assert torch.equal(uniform(11, torch.tensor([row]), width=3)[0], numbers[:3])  # a column's own
    assert torch.equal(whole[0], whole[3])
    assert len(set(whole[[0, 1, 2, 4]].flatten().tolist())) == 24
    assert not torch.equal(uniform(12, rows, width=6), whole)


def test_uniform_takes_every_seed_that_mix_gives() -> None:
    largest = uniform(2**63 - 1, torch.tensor([0, 1, 2**62]), width=4)  # row + seed wraps round
    assert bool(((largest >= 0) & (largest < 1)).all())


def test_uniform_of_nothing() -> None:
    assert uniform(1, torch.zeros(0, dtype=torch.int64), width=4).shape == (0, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Streams, normal and Gumbel numbers


def test_a_pass_has_one_seed_for_each_stream_and_for_each_of_its_keys() -> None:
    context = StepContext(seed=1, step=2, micro_step=3, layer=4)
    others = [replace(context, **{name: 9}) for name in ("seed", "step", "micro_step", "layer")]
    seeds = [pass_seed(each, stream) for each in (context, *others) for stream in Stream]
    assert len(set(seeds)) == len(seeds) == 5 * len(Stream)
    assert pass_seed(context, Stream.NOISE) == mix(1, 2, 3, 4, Stream.NOISE)


def test_the_seed_of_a_pass_is_the_same_on_every_rank() -> None:
    """A data rank is told apart by its coordinate, and holds sequences of its own."""
    context = StepContext(seed=1, step=2)
    here = replace(context, coordinate=5, sequence_index_B=torch.tensor([3]))
    assert all(pass_seed(here, stream) == pass_seed(context, stream) for stream in Stream)


def test_normal_numbers_are_the_quantiles_of_the_uniform_ones() -> None:
    """By Python's own inverse of the distribution function; erfinv of torch is less exact where tails are thin."""
    rows = torch.arange(40)
    expected = [[NormalDist().inv_cdf(u) for u in row] for row in uniform(3, rows, width=25).tolist()]
    found = normal(3, rows, width=25)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_normal_numbers_have_the_moments_of_a_normal_distribution() -> None:
    """Of x, x^2, x^3, x^4: 0, 1, 0, 3; their standard deviations: 1, sqrt(2), sqrt(15), sqrt(96)."""
    numbers = normal(3, torch.arange(2000), width=50)
    for power, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        deviation = math.sqrt(variance / numbers.numel())
        assert abs(float((numbers**power).mean()) - mean) < 5 * deviation, power


def test_gumbel_numbers_are_minus_log_minus_log_of_the_uniform_ones() -> None:
    rows = torch.arange(40)
    expected = [[-math.log(-math.log(u)) for u in row] for row in uniform(3, rows, width=25).tolist()]
    torch.testing.assert_close(
        gumbel(3, rows, width=25), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12
    )


def test_gumbel_numbers_have_the_quantiles_of_a_gumbel_distribution() -> None:
    """P(g <= x) = exp(-exp(-x)); the mean is Euler's constant, the variance pi^2 / 6."""
    numbers = gumbel(3, torch.arange(2000), width=50)
    assert numbers.dtype == torch.float64
    for x in (-1.5, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0):
        share = math.exp(-math.exp(-x))
        deviation = math.sqrt(share * (1 - share) / numbers.numel())
        assert abs(float((numbers <= x).double().mean()) - share) < 5 * deviation, x
    assert abs(float(numbers.mean()) - 0.5772156649) < 5 * math.pi / math.sqrt(6 * numbers.numel())
    assert float(numbers.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)


@pytest.mark.parametrize("numbers", [normal, gumbel])
def test_normal_and_gumbel_numbers_are_keyed_as_uniform_ones(numbers: Callable[[int, Tensor, int], Tensor]) -> None:
    """Monotone functions of them, so that what is proven of their keys holds here; and of the row alone."""
    rows = torch.tensor([5, 0, 7, 1 << 40])
    order = uniform(11, rows, 6).flatten().argsort()
    assert torch.equal(numbers(11, rows, 6).flatten().argsort(), order)
    assert torch.equal(torch.cat([numbers(11, rows[:1], 6), numbers(11, rows[1:], 6)]), numbers(11, rows, 6))
    assert numbers(11, rows[:0], 6).shape == (0, 6)


@pytest.mark.parametrize("numbers", [normal, gumbel])
@pytest.mark.parametrize("extreme", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_interval_give_finite_numbers(
    numbers: Callable[[int, Tensor, int], Tensor], extreme: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda seed, rows, width: torch.full((1, 1), extreme, dtype=torch.float64))
    number = float(numbers(1, torch.tensor([0]), 1))
    assert math.isfinite(number)
    assert (number > 3) is (extreme > 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# An independent statement of the distributions: the layer and its reference share these numbers, so that a comparison
# of the two does not test them. Seeds are fixed; bounds are 5 standard deviations, or a probability of 1 in 10^5.


def check_distribution(numbers: Tensor, cumulative: Callable[[Tensor], Tensor]) -> None:
    """Kolmogorov and Smirnov's test: the largest distance of the shares from the distribution function."""
    ordered = numbers.flatten().sort().values
    n = len(ordered)
    ranks = torch.arange(n + 1, dtype=torch.float64) / n
    expected = cumulative(ordered)
    distance = float(torch.maximum((expected - ranks[:-1]).max(), (ranks[1:] - expected).max()))
    assert distance < 2.47 / math.sqrt(n), distance  # P = 2 exp(-2 * 2.47^2) = 1e-5
    assert distance > 0.3 / math.sqrt(n), distance  # random numbers are not spread so evenly: P < 1e-5


def check_uniform(numbers: Tensor) -> None:
    """The distribution, its ends, the moments of u - 1/2 to the fourth, and each of the 53 bits that a number has."""
    check_distribution(numbers, lambda u: u)
    n, centred = numbers.numel(), numbers.flatten() - 0.5
    assert float(numbers.min()) < 12 / n  # P = exp(-12) that all are larger
    assert float(numbers.max()) > 1 - 12 / n
    for power in range(1, 5):
        mean = (1 - power % 2) / ((power + 1) * 2**power)
        square = 1 / ((2 * power + 1) * 4**power)
        assert abs(float((centred**power).mean()) - mean) < 5 * math.sqrt((square - mean**2) / n), power
    whole = (numbers.flatten() * 2.0**53).long()
    for bit in range(53):
        assert abs(float((whole >> bit & 1).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(n), bit


def check_independent(left: Tensor, right: Tensor) -> None:
    """The chi-square of pairs on a grid of 16 x 16: 255 degrees of freedom, standard deviation sqrt(2 * 255)."""
    cell = (left * 16).long().flatten() * 16 + (right * 16).long().flatten()
    counts, expected = torch.bincount(cell, minlength=256).double(), cell.numel() / 256
    chi_square = float((counts - expected).square().sum()) / expected
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255), chi_square


def test_uniform_numbers_are_uniform() -> None:
    for seed in (mix(0), mix(1, 2, 3)):
        check_uniform(uniform(seed, torch.arange(2000), width=50))


@pytest.mark.parametrize(
    "defect",
    [
        lambda u: u / 2,  # half the range
        lambda u: (u * 2**30).floor() / 2**30,  # half the bits
        lambda u: u.clamp(max=0.999),
        lambda u: (u + 0.01 * (u * 2 * math.pi).sin()).clamp(0, 1),  # a wave of one percent
        lambda u: torch.arange(u.numel(), dtype=torch.float64).view(u.shape) / u.numel(),  # all too even
    ],
)
def test_numbers_that_are_not_uniform_are_found(defect: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_uniform(defect(uniform(mix(0), torch.arange(2000), width=50)))


NEIGHBOURS: dict[str, dict[str, int]] = {
    "seed": {"seed": 2},
    "step": {"step": 3},
    "micro-step": {"micro_step": 4},
    "layer": {"layer": 5},
    "step and layer": {"step": 3, "layer": 3},
}


@pytest.mark.parametrize("key", NEIGHBOURS)
def test_numbers_of_neighbouring_passes_are_independent(key: str) -> None:
    context, rows = StepContext(seed=1, step=2, micro_step=3, layer=4), torch.arange(2000)
    numbers = uniform(pass_seed(context, Stream.NOISE), rows, width=50)
    check_independent(numbers, uniform(pass_seed(replace(context, **NEIGHBOURS[key]), Stream.NOISE), rows, width=50))


def test_numbers_of_streams_tokens_and_experts_are_independent() -> None:
    context, rows = StepContext(seed=1, step=2), torch.arange(2000)
    streams = [uniform(pass_seed(context, stream), rows, width=50) for stream in Stream]
    for first, second in pairwise(streams):
        check_independent(first, second)
    numbers = streams[0]
    check_independent(numbers[1:], numbers[:-1])  # tokens
    check_independent(numbers[:, 1:], numbers[:, :-1])  # experts
    check_independent(numbers[1:, :-1], numbers[:-1, 1:])  # the next token's expert, and this token's next expert
    with pytest.raises(AssertionError):  # passes whose seeds differ by 1 would share almost all rows
        check_independent(uniform(7, rows, width=50)[1:], uniform(8, rows, width=50)[:-1])


def test_normal_and_gumbel_numbers_have_their_distributions() -> None:
    rows = torch.arange(2000)
    check_distribution(normal(mix(0), rows, 50), lambda x: (1 + (x / math.sqrt(2)).erf()) / 2)
    check_distribution(gumbel(mix(0), rows, 50), lambda x: (-(-x).exp()).exp())
    with pytest.raises(AssertionError):
        check_distribution(normal(mix(0), rows, 50) * 1.05, lambda x: (1 + (x / math.sqrt(2)).erf()) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout


def test_dropout_masks_depend_on_the_seed_alone() -> None:
    x = torch.randn(40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 10
    dropped = dropout(x, 0.3, seed=5)
    torch.manual_seed(1)  # the global generator has no part in it, and is left as it was
    before = torch.get_rng_state()
    assert torch.equal(dropout(x, 0.3, seed=5), dropped)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(dropout(x * 2, 0.3, seed=5), dropped * 2)
    assert torch.equal(dropout(x.float(), 0.3, seed=5) == 0, dropped == 0)  # every dtype has the same mask
    assert not torch.equal(dropout(x, 0.3, seed=6) == 0, dropped == 0)


def test_dropout_masks_do_not_depend_on_the_default_dtype() -> None:
    x = torch.ones(40, dtype=torch.float64)
    expected = dropout(x, 0.3, seed=5)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(dropout(x, 0.3, seed=5), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_dropout_keeps_the_expectation() -> None:
    x = torch.full((400, 500), 2.0, dtype=torch.float64)
    dropped = dropout(x, 0.3, seed=5)
    kept = dropped != 0
    assert torch.allclose(dropped[kept], x[kept] / 0.7, rtol=1e-15)
    assert abs(float(kept.double().mean()) - 0.7) < 0.006  # standard deviation 0.001
    assert abs(float(dropped.mean()) - 2.0) < 0.02


def test_dropout_of_probability_0_is_the_identity() -> None:
    x = torch.randn(3, 4)
    assert dropout(x, 0.0, seed=5) is x


def test_dropout_passes_its_mask_to_the_gradient() -> None:
    x = torch.ones(20, 30, dtype=torch.float64, requires_grad=True)
    dropped = dropout(x, 0.4, seed=9)
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, dropped.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert dropout(torch.ones(5, dtype=dtype), 0.5, seed=1).dtype == dtype


def splitmix64(state: int) -> int:
    """One output of SplitMix64 as Steele, Lea and Flood (2014) print it, in whole numbers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_mix_and_uniform_are_splitmix64() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the published generator seeded with 0
    assert mix(1, 2) == splitmix64(splitmix64(1) + 2) >> 1
    seed, rows = mix(5), [0, 3, 1 << 40]
    expected = [[(splitmix64(splitmix64(seed + row) + column) >> 11) / 2**53 for column in range(4)] for row in rows]
    assert uniform(seed, torch.tensor(rows), width=4).tolist() == expected


def test_the_numbers_are_frozen() -> None:
    """A run that is continued by a later version goes on with the same numbers: these must never change."""
    assert [mix(), mix(0), mix(1, 2, 3), mix(-1)] == [
        0,
        8147104208329303767,
        3851293329796251419,
        8245168133484221968,
    ]
    assert uniform(42, torch.tensor([0, 3]), width=3).tolist() == [
        [0.34329192209867343, 0.9777767857540063, 0.4465878737451613],
        [0.019101220177022094, 0.9115039193989425, 0.04840032491660484],
    ]
    streams = {
        "JITTER": 0,
        "NOISE": 1,
        "SECOND_EXPERT": 2,
        "PRIORITY": 3,
        "DROPOUT": 4,
        "MIXER_CHOICE": 5,
        "MIXER_STEP": 6,
    }
    assert {stream.name: stream.value for stream in Stream} == streams
    assert pass_seed(StepContext(seed=1, step=2, micro_step=3, layer=4), Stream.DROPOUT) == mix(1, 2, 3, 4, 4)
    kept = dropout(torch.ones(12), 0.5, seed=42) > 0
    assert kept.int().tolist() == [1, 1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1]  # torch's own generator, as of torch 2.13
