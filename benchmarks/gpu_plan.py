"""What is measured on a GPU in which order, and the rule that shares out the time.

A plan is a list of steps, the most telling first; a step is a list of jobs. Nothing here touches
a GPU or reads a clock: `follow` is given both, so that a dry run follows the same plan.

    until(step) = now + min(most, max(least, end - now - sum of least of the later steps))

A step that is late takes nothing from what the later ones need at the least; what a step leaves is
free for all that follow. A job ends by itself within its own `most`, or is ended.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Job:
    """One entry of the record, made by a worker or by a command of its own."""

    name: str
    most: float  # seconds, its own deadline
    least: float = 3.0  # not begun with less time
    kind: str = "stages"  # of the record
    work: dict = field(default_factory=dict)  # what a worker is asked
    command: tuple[str, ...] = ()
    environment: dict = field(default_factory=dict)  # of the command
    alone: bool = False  # a worker that has run nothing else


@dataclass(frozen=True)
class Step:
    """Jobs that share a budget, in seconds."""

    name: str
    least: float  # kept free for it by the steps before
    most: float
    jobs: tuple[Job, ...]

    def left(self, record: "Done", renew: bool) -> list[Job]:
        return [job for job in self.jobs if not record.has(job.kind, job.name, renew)]


class Done(Protocol):
    """What a record tells."""

    data: dict

    def has(self, kind: str, name: str, renew: bool) -> bool: ...


@dataclass(frozen=True)
class Event:
    """A job that was begun; seconds of the clock."""

    step: str
    job: str
    began: float
    ended: float
    deadline: float


def follow(
    steps: Iterable[Step],
    record: Done,
    do: Callable[[Job, float], object],
    clock: Callable[[], float],
    seconds: float,
    renew: bool = False,
    prepare: Callable[[Job, float], object] = lambda job, until: None,
) -> Iterator[Event]:
    """Do what is not done, each job once, within so many seconds.

    Args:
        do: is given a job and the deadline, a time of the clock, and puts what it finds into the
            record. prepare: is called before, with the end of the step: what a job needs, a process
            to start, takes the step's time and not the job's.
    Yields:
        an event after each job.
    """
    steps = [step for step in steps if step.left(record, renew)]
    end = clock() + seconds
    for i, step in enumerate(steps):
        begun = clock()
        later = sum(other.least for other in steps[i + 1 :])
        share = min(step.most, max(step.least, end - begun - later))
        until = min(end, begun + share)
        for job in step.left(record, renew):
            now = clock()
            if until - now < job.least:
                continue  # a later job may need less
            prepare(job, until)
            deadline = min(until, clock() + job.most)
            do(job, deadline)
            yield Event(step.name, job.name, now, clock(), deadline)
