"""How long a run still takes, from the jobs that ended so far. Pure: times come in as seconds, no clock is read."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping


class TimeLeft:
    """Remaining wall seconds = remaining work per rule / jobs observed to run at the same time.

    A rule's jobs are expected to take the mean of its finished ones; a rule that none finished of, the mean of all.
    On a cluster the durations include the waiting time in the queue and the parallelism the jobs waiting there; the
    two cancel, so the quotient is still the pace of the run.

    Parameters
    ----------
    counts
        Jobs by rule, as planned.
    free_rules
        Rules that only collect others and take no time.
    """

    def __init__(self, counts: Mapping[str, int] | None = None, free_rules: Iterable[str] = ("all",)) -> None:
        self.counts = dict(counts or {})
        self.total = sum(self.counts.values())
        self._free_rules = frozenset(free_rules)
        self._running: dict[int, tuple[str, float]] = {}  # job -> rule, start
        self._ended: Counter[str] = Counter()  # finished and failed
        self._failed: set[int] = set()
        self._durations: defaultdict[str, list[float]] = defaultdict(list)  # finished
        self._busy = 0.0  # job seconds of everything that ended
        self._first_start: float | None = None

    def started(self, job: int, rule: str, now: float) -> None:
        if job in self._failed:  # a retry: it was not at its end after all
            self._failed.remove(job)
            self._ended[rule] -= 1
        self._running[job] = (rule, now)
        self._first_start = now if self._first_start is None else self._first_start

    def finished(self, job: int, now: float) -> None:
        rule, seconds = self._end(job, now)
        if rule is not None:
            self._durations[rule].append(seconds)

    def failed(self, job: int, now: float) -> None:
        """A failed job costs time but says nothing about how long its rule takes."""
        rule, _ = self._end(job, now)
        if rule is not None:
            self._failed.add(job)

    def _end(self, job: int, now: float) -> tuple[str | None, float]:
        if job not in self._running:
            return None, 0.0
        rule, start = self._running.pop(job)
        seconds = max(0.0, now - start)
        self._ended[rule] += 1
        self._busy += seconds
        return rule, seconds

    def seconds_left(self, now: float) -> float | None:
        """Expected wall seconds until the last job ends; None while too little has been measured.

        Measured is enough when a job has finished of the rules of half of the remaining jobs, or half of all jobs.
        """
        measured = [s for rule, each in self._durations.items() if rule not in self._free_rules for s in each]
        waiting = self._waiting()
        remaining = waiting + Counter(rule for rule, _ in self._running.values())
        n_remaining = remaining.total()
        n_known = sum(n for rule, n in remaining.items() if rule in self._durations or rule in self._free_rules)
        if not measured or not n_remaining:
            return None
        if 2 * n_known < n_remaining and 2 * self._ended.total() < self.total:
            return None

        overall = sum(measured) / len(measured)
        expected = {rule: self._expected(rule, overall, now) for rule in remaining}
        rest_of_running = [max(0.0, expected[rule] - (now - start)) for rule, start in self._running.values()]
        work = sum(n * expected[rule] for rule, n in waiting.items()) + sum(rest_of_running)
        parallel = min(self._parallelism(now), n_remaining)
        return max([work / parallel, *rest_of_running])

    def _waiting(self) -> Counter[str]:
        """Jobs not started yet by rule; those that the plan did not name (checkpoints add some) under ''."""
        running = Counter(rule for rule, _ in self._running.values())
        waiting = +Counter({rule: n - self._ended[rule] - running[rule] for rule, n in self.counts.items()})
        unnamed = self.total - self._ended.total() - running.total() - waiting.total()
        if unnamed > 0:
            waiting[""] = unnamed
        return waiting

    def _expected(self, rule: str, overall: float, now: float) -> float:
        if rule in self._free_rules:
            return 0.0
        durations = self._durations.get(rule)
        if durations:
            return sum(durations) / len(durations)
        # A job that already runs longer than the overall mean shows that its rule is slower.
        return max([overall, *(now - start for each, start in self._running.values() if each == rule)])

    def _parallelism(self, now: float) -> float:
        """Mean number of jobs at the same time since the first start, or those running now where these are more."""
        span = now - self._first_start if self._first_start is not None else 0.0
        busy = self._busy + sum(max(0.0, now - start) for _, start in self._running.values())
        mean = busy / span if span > 0 else 0.0
        return max(mean, len(self._running)) or 1.0
