"""Requests of a page: the latest wins, cancelling ends them, and errors are shown without removing images."""

import gc

import pytest

from dnnlib.errors import ConfigError
from edm2.explorer import visit as visits
from edm2.explorer.setting import Choices
from edm2.explorer.visit import Stopped, Visit


@pytest.fixture(autouse=True)
def every_record(monkeypatch):
    monkeypatch.setattr(visits, "_INTERVAL_SEC", 0)


class Work:
    """A generator of numbers that counts them."""

    def __init__(self, count=100, error=None):
        self.given, self.ended = 0, False
        self.count, self.error = count, error

    def __call__(self):
        try:
            for index in range(self.count):
                self.given = index + 1
                yield index
            if self.error is not None:
                raise self.error
        finally:
            self.ended = True


def test_the_last_record_arrives_and_most_others_are_left_out(monkeypatch):
    monkeypatch.setattr(visits, "_INTERVAL_SEC", 60)
    assert list(Visit().follow(0.0, Work()())) == [0, 99]
    assert list(Visit().follow(0.0, Work(count=1)())) == [0]


def test_cancelling_ends_the_work_before_its_next_record():
    visit, work = Visit(), Work()
    visit.announce(1.0)
    assert visit.begin(1.5)
    records = visit.follow(1.5, work())
    assert next(records) == 0
    assert not visit.cancel(2.0)  # it runs: it says itself that it was stopped
    assert list(records) == [Stopped(replaced=False)]
    assert work.ended and work.given <= 2


def test_a_request_that_waits_can_be_cancelled():
    visit = Visit()
    visit.announce(1.0)
    assert visit.cancel(2.0) and not visit.cancel(2.5)
    assert not visit.begin(1.5)
    visit.announce(3.0)
    assert visit.begin(3.0)


def test_a_newer_request_replaces_the_one_that_runs():
    visit, work = Visit(), Work()
    assert visit.begin(1.0)
    records = visit.follow(1.0, work())
    assert next(records) == 0
    visit.announce(2.0)
    assert list(records) == [Stopped(replaced=True)] and work.ended and work.given <= 2
    assert visit.begin(2.0)
    assert list(visit.follow(2.0, iter_of(7))) == [7]


def test_an_older_request_that_arrives_later_replaces_nothing():
    visit, work = Visit(), Work(count=3)
    visit.announce(2.0)
    assert visit.begin(2.0)
    records = visit.follow(2.0, work())
    assert next(records) == 0
    visit.announce(1.0)
    assert not visit.begin(1.0)
    assert list(records) == [1, 2]


def test_a_request_that_is_replaced_before_its_first_record_says_so():
    """Gradio clears all outputs of a generator that yields nothing, and with them the images."""
    visit = Visit()
    assert visit.begin(1.0)
    records = visit.follow(1.0, Work()())
    visit.announce(2.0)
    assert list(records) == [Stopped(replaced=True)]


def test_pages_do_not_stop_each_other():
    mine, yours = Visit(), Visit()
    assert mine.begin(1.0)
    records = mine.follow(1.0, Work(count=2)())
    yours.announce(2.0)
    yours.cancel(3.0)
    assert list(records) == [0, 1]


def test_closing_a_request_ends_its_work():
    work = Work()
    records = Visit().follow(0.0, work())
    next(records)
    records.close()
    assert work.ended and work.given == 1


def iter_of(*records):
    yield from records


class Fake:
    """An explorer whose grid is whatever `records` gives."""

    batch = 16

    def __init__(self):
        self.networks = self
        self.records = None

    def enter_thread(self):
        pass

    def grid(self, setting):
        return self.records()


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("gradio")
    from edm2.explorer.page import Page

    choices = Choices(networks=[], guides=[("none", "none")], guide="none", guidance=1.5, typed=True)
    return Page(Fake(), choices)


VALUES = ("grid", 0, 4, 1, 8, *2 * ["net.pkl", 0.1, "random", 2, "heun", "none", 1, False, 0, 1])


def status(update, page):
    (text,) = [html for component, html in update.items() if component is page._status]
    return text


def test_an_error_is_a_line_on_the_page_and_the_next_request_runs(page):
    visit = Visit()
    page._explorer.records = Work(count=0, error=ConfigError("no <such> network"))
    (update,) = page._refresh(1.0, visit, True, *VALUES)
    assert "no &lt;such&gt; network" in status(update, page) and len(update) == 1  # images stay
    page._explorer.records = Work(count=2)
    assert "Done" in status(list(page._refresh(2.0, visit, True, *VALUES))[-1], page)


def test_a_bug_is_a_line_on_the_page_and_a_traceback_in_the_terminal(page, capfd):
    page._explorer.records = Work(count=1, error=ZeroDivisionError("ours"))
    *_, update = page._refresh(1.0, Visit(), True, *VALUES)
    assert "ZeroDivisionError" in status(update, page) and "ours" not in status(update, page)
    assert "ZeroDivisionError: ours" in capfd.readouterr().err


def test_a_wrong_value_ends_what_ran_before(page):
    visit, work = Visit(), Work()
    page._explorer.records = work
    before = page._refresh(1.0, visit, True, *VALUES)
    next(before)
    page._announce_change(2.0, visit, True)
    assert "Waiting" in status(*before, page) and work.ended
    (update,) = page._refresh(2.5, visit, True, "grid", 0.5, *VALUES[2:])
    assert "first seed must be a whole number" in status(update, page)


def test_a_page_waits_for_the_other_one_and_is_told(page):
    mine, yours = Visit(), Visit()
    page._explorer.records = Work()
    running = page._refresh(1.0, mine, True, *VALUES)
    next(running)
    assert "Waiting for another page" in page._announce(1.0, yours, True)
    assert "Stopped" in page._stop(2.0, yours, True)
    (update,) = page._refresh(1.5, yours, True, *VALUES)  # when its turn comes
    assert status(update, page) == {"__type__": "update"}  # nothing changes
    running.close()
    gc.collect()
    assert "Waiting" not in str(page._announce(3.0, yours, True))


def test_changes_are_not_followed_unless_asked_for(page):
    visit, work = Visit(), Work()
    page._explorer.records = work
    assert "Generate" in page._announce_change(1.0, visit, False)
    (update,) = page._follow_change(1.5, visit, False, *VALUES)
    assert "Generate" in status(update, page) and work.given == 0
    assert visit.newest == 0


def test_gradio_runs_one_request_at_a_time_and_bounds_the_queue(page):
    functions = [fn for fn in page.demo.fns.values() if fn.fn is not None]
    works = [fn for fn in functions if fn.fn.__name__ in ("_refresh", "_follow_change")]
    assert len(works) == 10
    assert {(fn.concurrency_id, fn.concurrency_limit, fn.queue) for fn in works} == {("networks", 1, True)}
    assert not any(fn.queue for fn in functions if fn not in works)
    assert page.demo._queue.max_size == 16
