"""Jobs beside the page: one at a time, the newest of each visitor, and none that outlives its end."""

import threading

import pytest

from dnnlib.errors import ConfigError
from edm2.explorer.jobs import Jobs, Stopped, Waiting


@pytest.fixture
def jobs():
    found = Jobs(max_waiting=2)
    yield found
    found.close()
    assert not found._thread.is_alive()


class Work:
    """Records that come when they are let, and what became of them."""

    def __init__(self, count=3, error=None):
        self.begun, self.go, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.given = 0
        self.count, self.error = count, error

    def __call__(self):
        try:
            for index in range(self.count):
                self.given = index + 1
                yield index
                self.begun.set()
                assert self.go.wait(60)
            if self.error is not None:
                raise self.error
        finally:
            self.ended.set()


def test_the_last_record_arrives_and_what_was_not_seen_in_time_is_left_out(jobs):
    records = list(jobs.submit("me", lambda: iter(range(1000))).follow())
    assert records[-1] == 999 and len(records) < 900
    seen = [record for record in records if not isinstance(record, Waiting)]
    assert seen == sorted(seen)


def test_stopping_ends_the_work_before_its_next_record(jobs):
    work = Work(count=100)
    job = jobs.submit("me", work)
    assert work.begun.wait(60)
    jobs.stop("me")
    work.go.set()
    assert list(job.follow())[-1] == Stopped(replaced=False)
    assert work.ended.wait(60) and work.given <= 2


def test_a_visitors_new_job_replaces_the_old_one_whether_it_runs_or_waits(jobs):
    running, waiting = Work(), Work()
    first = jobs.submit("me", running)
    assert running.begun.wait(60)
    second = jobs.submit("me", waiting)
    third = jobs.submit("me", lambda: iter([7]))
    assert list(second.follow()) == [Stopped(replaced=True)]
    running.go.set()
    assert list(first.follow())[-1] == Stopped(replaced=True)
    assert list(third.follow())[-1] == 7
    assert running.ended.is_set() and waiting.given == 0


def test_visitors_take_turns_and_do_not_stop_each_other(jobs):
    mine, yours = Work(count=1), Work(count=2)
    first, second = jobs.submit("me", mine), jobs.submit("you", yours)
    followed = second.follow()
    assert next(followed) == Waiting()
    jobs.stop("somebody else")
    for work in (mine, yours):
        work.go.set()
    assert list(followed)[-1] == 1
    assert list(first.follow())[-1] == 0


def test_too_many_are_refused(jobs):
    work = Work()
    jobs.submit("me", work)
    assert work.begun.wait(60)
    for name in ("a", "b"):
        jobs.submit(name, lambda: iter([1]))
    with pytest.raises(ConfigError, match="2 others are waiting"):
        jobs.submit("c", lambda: iter([1]))
    jobs.stop("me")
    work.go.set()


def test_a_mistake_is_raised_where_the_job_is_followed_and_the_next_job_runs(jobs):
    work = Work(count=0, error=ConfigError("no such network"))
    with pytest.raises(ConfigError, match="no such network"):
        list(jobs.submit("me", work).follow())
    assert list(jobs.submit("me", lambda: iter([1])).follow())[-1] == 1


def test_a_page_that_is_left_stops_its_job(jobs):
    work = Work(count=100)
    followed = jobs.submit("me", work).follow()
    next(followed)
    assert work.begun.wait(60)
    followed.close()
    work.go.set()
    assert work.ended.wait(60) and work.given <= 2


def test_what_was_asked_for_earlier_does_not_replace_what_was_asked_for_later(jobs):
    work = Work(count=100)
    assert jobs.make_way("me", 2.0)
    job = jobs.submit("me", work)
    assert work.begun.wait(60)
    assert not jobs.make_way("me", 1.0) and not job._is_stopped()
    assert jobs.make_way("you", 1.0) and not job._is_stopped()
    assert jobs.make_way("me", 2.0) and job._is_stopped()  # at the same time: the one that arrives later
    work.go.set()
    assert list(job.follow())[-1] == Stopped(replaced=True)
