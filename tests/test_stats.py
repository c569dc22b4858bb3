"""``Stats``: what it counts, prints and forgets."""

from __future__ import annotations

from hvd_gqsgd import GlobalQSGD, Stats

COUNTS = {
    "steps": 1200, "tensors": 9600, "tensors_bypassed": 4800, "compressed_bytes_before": 40_000_000,
    "compressed_bytes_on_wire": 10_000_000, "bypassed_bytes": 1_000_000, "elements": 10_000_000,
    "bits": 8,
}  # fmt: skip


def test_what_is_printed() -> None:
    assert str(Stats(**COUNTS)).splitlines() == [
        "steps: 1,200; tensors: 9,600, of which 4,800 bypassed (50.0%)",
        "all tensors: 41,000,000 bytes -> 11,000,000 on the wire, 3.73 times fewer",
        "compressed tensors: 40,000,000 bytes -> 10,000,000 on the wire, 4.00 times fewer, "
        "8.00 bits per element",
    ]


def test_what_is_printed_of_nothing() -> None:
    """No mean over no elements, and no division by zero."""
    assert str(Stats()).splitlines() == [
        "steps: 0; tensors: 0, of which 0 bypassed (0.0%)",
        "nothing was exchanged: no step has run, or the job has one rank, on which Horovod does "
        "not call the compressor",
    ]


def test_reset() -> None:
    stats = Stats(**COUNTS)
    stats.reset()
    assert stats == Stats()


def test_a_compressor_gives_out_copies() -> None:
    """On the instance and on the class; what is done to one changes no count."""
    for compressor in (GlobalQSGD(), GlobalQSGD):
        compressor.stats().tensors = 99
        assert compressor.stats() == Stats()
        compressor.reset_stats()
        assert compressor.stats() == Stats()
