"""A clock for tests, that goes when told: it stands in for the module ``time`` of a file."""


class FakeClock:
    """Every clock of ``time`` from one number.

    Attributes:
        now: seconds, to be moved on.
    """

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.7e9 + self.now
