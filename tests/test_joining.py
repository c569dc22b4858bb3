"""Small tensors that go together: the same ones on all ranks, whenever each of them comes."""

from __future__ import annotations

import random
from collections import deque

import pytest

from hvd_gqsgd.engine.joining import Joined, Joining

MOST = 400


class Rank:
    """Hands in tensors, given as their kinds and sizes, and has exchanges in flight."""

    def __init__(self, tensors: list[tuple[str, int]]) -> None:
        self.joining: Joining[int] = Joining(MOST)
        self.left = deque(enumerate(tensors))
        self.sent: list[Joined[int]] = []
        self.in_flight: deque[Joined[int]] = deque()
        self.agreed = 0

    def hand_in(self) -> None:
        number, (kind, nbytes) = self.left.popleft()
        self.joining.add(number, kind, nbytes)
        self.start()

    def start(self) -> None:
        while (joined := self.joining.take(self.in_flight)) is not None:
            self.sent.append(joined)
            self.in_flight.append(joined)

    def agree(self, ranks: list[Rank]) -> None:
        """The next header is back."""
        behind = min(rank.sent[self.agreed].behind for rank in ranks)
        self.agreed += 1
        if self.joining.undecided and self.agreed == len(self.sent):
            self.joining.agree(behind)

    def land(self) -> None:
        self.in_flight.popleft()
        self.start()

    def moves(self, ranks: list[Rank]) -> list[str]:
        """What may happen next."""
        arrived = self.agreed < min(len(rank.sent) for rank in ranks)
        done = self.agreed - (len(self.sent) - len(self.in_flight))
        return ["hand in"] * bool(self.left) + ["agree"] * arrived + ["land"] * (done > 0)


def exchange(count: int, tensors: list[tuple[str, int]], seed: int) -> list[Joined[int]]:
    """The exchanges of some ranks, where all that may happen does so in any order."""
    draw, ranks = random.Random(seed), [Rank(tensors) for _ in range(count)]
    hurry = [draw.choice([1, 1, 50]) for _ in ranks]  # of the backward pass
    while any(rank.left or rank.joining or rank.in_flight for rank in ranks):
        moves = [
            (rank, move)
            for rank, weight in zip(ranks, hurry, strict=True)
            for move in rank.moves(ranks)
            for _ in range(weight if move == "hand in" else 5)
        ]
        assert moves, "they wait for each other"
        rank, move = draw.choice(moves)
        if move == "agree":
            rank.agree(ranks)
        else:
            rank.hand_in() if move == "hand in" else rank.land()
    for rank in ranks:
        assert [each.members for each in rank.sent] == [each.members for each in ranks[0].sent]
    return ranks[0].sent


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("seed", range(16))
def test_the_same_tensors_on_all_ranks(ranks: int, seed: int) -> None:
    draw = random.Random(seed)
    tensors = [
        (draw.choice("aaaab"), draw.choice([1, 20, 50, 100, 101, 1000]) if seed % 2 else 20)
        for _ in range(draw.choice([1, 20, 150]))
    ]
    sent = exchange(ranks, tensors, seed)
    assert [number for joined in sent for number in joined.members] == [*range(len(tensors))]
    for joined in sent:
        kinds, sizes = zip(*(tensors[number] for number in joined.members), strict=True)
        if len(joined.members) > 1:
            assert len(set(kinds)) == 1
            assert max(sizes) <= MOST // 4
            assert sum(sizes) <= MOST


def test_as_many_as_may() -> None:
    """Where all tensors are there before the first exchange is done."""
    rank = Rank([("a", 10)] * 100)
    while rank.left:
        rank.hand_in()
    while rank.in_flight:
        rank.agree([rank])
        rank.land()
    assert [len(joined.members) for joined in rank.sent] == [1, 1, 40, 40, 18]


def test_large_ones_do_not_wait() -> None:
    rank = Rank([("a", 101)] * 5)
    while rank.left:
        rank.hand_in()
    assert len(rank.in_flight) == 5
