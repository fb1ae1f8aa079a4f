"""Rerouting of overflow: all choices at once find what they would find one after another, in the order of the queue."""

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_parallel.moe.capacity.reroute import reroute

INFINITY = float("inf")
NAIVE = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Case:
    """ids, routed, overflows: by token and choice. ranking: by token and expert. room: by block and expert. line: flat
    numbers of all choices, foremost first."""

    ids: list[list[int]]
    routed: list[list[bool]]
    overflows: list[list[bool]]
    ranking: list[list[float]]
    block: list[int]
    room: list[int]
    line: list[int]
    num_choices: int
    num_experts: int

    def run(self) -> tuple[list[list[int]], list[list[bool]]]:
        ids_GK = torch.tensor(self.ids, dtype=torch.int64).view(-1, self.num_choices)
        routed_GK, overflows_GK = (
            torch.tensor(mask, dtype=torch.bool).view(-1, self.num_choices) for mask in (self.routed, self.overflows)
        )
        ranking_GE = torch.tensor(self.ranking, dtype=torch.float64).view(-1, self.num_experts)
        block_G, room_Q, order_N = (
            torch.tensor(numbers, dtype=torch.int64) for numbers in (self.block, self.room, self.line)
        )
        found_ids, found = reroute(ids_GK, routed_GK, overflows_GK, ranking_GE, block_G, room_Q, order_N)
        assert ids_GK.tolist() == self.ids, "what came in is as it was"
        return found_ids.tolist(), found.tolist()


def one_after_another(case: Case) -> tuple[list[list[int]], list[list[bool]]]:
    """Each choice that overflows, foremost first: to the best expert, the smaller number on ties, that its token was
    not routed to, that no other choice of its token has found, that its ranking allows and that has room."""
    ids, found = [list(row) for row in case.ids], [[False] * case.num_choices for _ in case.ids]
    room = list(case.room)
    had = [{e for e, routed in zip(*rows, strict=True) if routed} for rows in zip(case.ids, case.routed, strict=True)]
    for flat in case.line:
        t, k = divmod(flat, case.num_choices)
        if not case.overflows[t][k]:
            continue
        places = {e: case.block[t] * case.num_experts + e for e in range(case.num_experts)}
        open_ = [e for e in places if e not in had[t] and case.ranking[t][e] > -INFINITY and room[places[e]] > 0]
        if open_:
            best = min(open_, key=lambda e: (-case.ranking[t][e], e))
            ids[t][k], found[t][k] = best, True
            had[t].add(best)
            room[places[best]] -= 1
    return ids, found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rankings of three values and -inf, so that many tie; a queue in any order; little room."""
    num_experts = draw(st.integers(1, 6))
    num_choices = draw(st.integers(1, min(3, num_experts)))
    num_blocks, length = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    num_tokens = num_blocks * length
    ids, routed, overflows, ranking = [], [], [], []
    values = st.sampled_from([0.0, 0.5, 1.0, -INFINITY])
    for _ in range(num_tokens):
        ids.append(list(draw(st.permutations(range(num_experts)))[:num_choices]))
        routed.append([draw(st.sampled_from([True, True, False])) for _ in range(num_choices)])
        overflows.append([was_routed and draw(st.booleans()) for was_routed in routed[-1]])
        ranking.append([draw(values) for _ in range(num_experts)])
    return Case(
        ids,
        routed,
        overflows,
        ranking,
        block=[token // length for token in range(num_tokens)],
        room=[draw(st.integers(0, 2)) for _ in range(num_blocks * num_experts)],
        line=list(draw(st.permutations(range(num_tokens * num_choices)))),
        num_choices=num_choices,
        num_experts=num_experts,
    )


@settings(NAIVE, max_examples=60)
@given(cases())
def test_all_at_once_find_what_one_after_another_would(case: Case) -> None:
    assert case.run() == one_after_another(case)


@NAIVE
@given(cases())
def test_no_expert_takes_more_than_it_has_room_for(case: Case) -> None:
    """And only what overflowed goes anywhere; room is left only where no choice without a place could have used it."""
    ids, found = case.run()
    taken = [0] * len(case.room)
    for t, row in enumerate(ids):
        for k, expert in enumerate(row):
            assert case.overflows[t][k] or not found[t][k]
            assert found[t][k] or expert == case.ids[t][k]
            taken[case.block[t] * case.num_experts + expert] += found[t][k]
    assert all(few <= many for few, many in zip(taken, case.room, strict=True))
    for t, row in enumerate(ids):
        held = {e for e, routed in zip(case.ids[t], case.routed[t], strict=True) if routed}
        held |= {e for e, was_found in zip(row, found[t], strict=True) if was_found}
        if any(over and not was_found for over, was_found in zip(case.overflows[t], found[t], strict=True)):
            for expert in set(range(case.num_experts)) - held:
                queue = case.block[t] * case.num_experts + expert
                assert taken[queue] == case.room[queue] or case.ranking[t][expert] == -INFINITY


@NAIVE
@given(cases())
def test_the_experts_of_a_token_stay_distinct(case: Case) -> None:
    """What it was routed to at first, dropped or not, it does not take again; nor one expert twice, nor one of -inf."""
    ids, found = case.run()
    for t, row in enumerate(ids):
        new = [expert for expert, was_found in zip(row, found[t], strict=True) if was_found]
        old = [expert for expert, routed in zip(case.ids[t], case.routed[t], strict=True) if routed]
        assert len(set(new + old)) == len(new + old)
        assert all(case.ranking[t][expert] > -INFINITY for expert in new)


def three_tokens(room: list[int], line: list[int]) -> Case:
    """All three overflow at expert 0 and rank 1 before 2 before 3; token 1 may not go to 2."""
    rankings = [[9.0, 3.0, 2.0, 1.0], [9.0, 3.0, -INFINITY, 1.0], [9.0, 3.0, 2.0, 1.0]]
    return Case([[0]] * 3, [[True]] * 3, [[True]] * 3, rankings, [0] * 3, room, line, num_choices=1, num_experts=4)


def test_three_tokens_by_hand() -> None:
    """One place at each of 1, 2 and 3. In the queue 0, 1, 2: token 0 takes 1; token 1 finds it full and may not have 2,
    so it takes 3; token 2 takes 2. In the queue 2, 1, 0: token 2 takes 1, token 1 takes 3, token 0 takes 2."""
    assert three_tokens([0, 1, 1, 1], [0, 1, 2]).run() == ([[1], [3], [2]], [[True]] * 3)
    assert three_tokens([0, 1, 1, 1], [2, 1, 0]).run() == ([[2], [3], [1]], [[True]] * 3)


def test_a_choice_that_finds_no_room_stays_dropped() -> None:
    """One place at 1 and one at 2: token 1, second in the queue, may have neither."""
    assert three_tokens([0, 1, 1, 0], [0, 1, 2]).run() == ([[1], [0], [2]], [[True], [False], [True]])
    assert three_tokens([5, 0, 0, 0], [0, 1, 2]).run() == ([[0]] * 3, [[False]] * 3), "nor its own expert again"


def test_two_choices_of_one_token_find_two_experts() -> None:
    """Both overflow, and expert 2 has room for both: the foremost in the queue has it, the other takes 3."""
    first, second = (
        Case([[0, 1]], [[True, True]], [[True, True]], [[9.0, 8.0, 7.0, 6.0]], [0], [0, 0, 2, 2], line, 2, 4)
        for line in ([0, 1], [1, 0])
    )
    assert first.run() == ([[2, 3]], [[True, True]])
    assert second.run() == ([[3, 2]], [[True, True]])


def test_of_equal_ranks_the_smaller_number_is_taken() -> None:
    case = Case([[3]], [[True]], [[True]], [[0.5, 0.5, 0.5, 0.9]], [0], [0, 1, 1, 0], [0], 1, 4)
    assert case.run() == ([[1]], [[True]])


def test_room_is_each_blocks_own() -> None:
    """Two blocks of one token: the second has no room at expert 1, and none of the first's."""
    ranking = [[9.0, 1.0]] * 2
    case = Case([[0], [0]], [[True]] * 2, [[True]] * 2, ranking, [0, 1], [0, 2, 0, 0], [0, 1], 1, 2)
    assert case.run() == ([[1], [0]], [[True], [False]])
