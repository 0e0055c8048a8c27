"""When jobs fire: the rules of cron on ordinary days and on those of the clock's changes, and the
schedule under a clock that the test moves.
"""

import asyncio
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from balancesync import schedule as module
from balancesync.config import JobConfig, ScheduleConfig
from balancesync.cron import CronFields, parse_cron
from balancesync.fires import next_fire
from balancesync.schedule import Schedule

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
BERLIN = "Europe/Berlin"
NEW_YORK = "America/New_York"
LORD_HOWE = "Australia/Lord_Howe"
BEIRUT = "Asia/Beirut"


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def fires(cron: str, change: str, zone: str) -> list[str]:
    """The fires in the five hours around a change of the clock, by what the clock shows."""
    local = ZoneInfo(zone)
    at = utc(change) - 2.5 * HOUR
    found = []
    while (at := next_fire(parse_cron(cron), at, local)) < utc(change) + 2.5 * HOUR:
        found.append(
            at.astimezone(local).isoformat()[11:].replace(":00+", "+").replace(":00-", "-")
        )
    return found


@pytest.mark.parametrize(
    ("cron", "after", "expected"),
    [
        ("* * * * *", "2026-01-01 00:00", "2026-01-01 00:01"),
        ("* * * * *", "2026-01-01 00:00:00.000001", "2026-01-01 00:01"),
        ("* * * * *", "2026-01-01 00:00:59.999999", "2026-01-01 00:01"),
        ("0 * * * *", "2026-01-01 23:30", "2026-01-02 00:00"),
        ("*/20 9-17 * * mon-fri", "2026-10-16 17:40", "2026-10-19 09:00"),
        ("0 2 * * *", "2026-01-01 02:00", "2026-01-02 02:00"),
        ("0 2 * * *", "2026-01-01 01:59:59.999999", "2026-01-01 02:00"),
        ("0 0 * * 0", "2026-01-01 00:00", "2026-01-04 00:00"),
        ("0 0 * * 7", "2026-01-01 00:00", "2026-01-04 00:00"),
        ("59 23 31 12 *", "2026-12-31 23:59", "2027-12-31 23:59"),
        # Leap days, over a year that is none.
        ("0 0 29 2 *", "2026-03-01 00:00", "2028-02-29 00:00"),
        ("0 0 29 2 *", "2096-03-01 00:00", "2104-02-29 00:00"),
        ("0 0 29 2 */7", "2026-03-01 00:00", "2032-02-29 00:00"),
        ("0 0 1 3 *", "2028-02-28 23:59", "2028-03-01 00:00"),
        # Months that have no such day are left out.
        ("0 0 31 * *", "2026-01-31 00:00", "2026-03-31 00:00"),
        ("0 0 31 * *", "2026-03-31 00:00", "2026-05-31 00:00"),
        ("0 0 30 * *", "2026-01-30 00:00", "2026-03-30 00:00"),
        ("0 12 28-31 2 *", "2026-02-28 12:00", "2027-02-28 12:00"),
        # Day and weekday both restricted: either. One of them with a star: both.
        ("0 0 13 * fri", "2026-02-06 00:00", "2026-02-13 00:00"),
        ("0 0 13 * fri", "2026-02-13 00:00", "2026-02-20 00:00"),
        ("0 0 13 * fri", "2026-04-10 00:00", "2026-04-13 00:00"),
        ("0 0 */2 * fri", "2026-02-06 00:00", "2026-02-13 00:00"),
        ("0 0 13 * */5", "2026-01-01 00:00", "2026-02-13 00:00"),
    ],
)
def test_next_fire(cron: str, after: str, expected: str) -> None:
    assert next_fire(parse_cron(cron), utc(after), ZoneInfo("UTC")) == utc(expected)


def test_next_fire_is_in_utc() -> None:
    zone = ZoneInfo(BERLIN)
    fire = next_fire(parse_cron("0 2 * * *"), datetime(2026, 7, 1, 1, tzinfo=zone), zone)
    assert fire.tzinfo is UTC
    assert fire == utc("2026-07-01 00:00")


@pytest.mark.parametrize(
    ("zone", "change", "cron", "expected"),
    [
        # 02:00 to 03:00 is shown again.
        (BERLIN, "2026-10-25 01:00", "0 2 * * *", "02:00+02:00"),
        (BERLIN, "2026-10-25 01:00", "30 1-3 * * *", "01:30+02:00 02:30+02:00 03:30+01:00"),
        (BERLIN, "2026-10-25 01:00", "0 */2 * * *", "02:00+02:00 02:00+01:00 04:00+01:00"),
        (
            BERLIN,
            "2026-10-25 01:00",
            "*/30 2 * * *",
            "02:00+02:00 02:30+02:00 02:00+01:00 02:30+01:00",
        ),
        (NEW_YORK, "2026-11-01 06:00", "30 1 * * *", "01:30-04:00"),
        (
            NEW_YORK,
            "2026-11-01 06:00",
            "30 * * * *",
            "00:30-04:00 01:30-04:00 01:30-05:00 02:30-05:00",
        ),
        # 01:30 to 02:00 is shown again.
        (LORD_HOWE, "2026-04-04 15:00", "0,45 1 * * *", "01:00+11:00 01:45+11:00"),
        (
            LORD_HOWE,
            "2026-04-04 15:00",
            "45 * * * *",
            "23:45+11:00 00:45+11:00 01:45+11:00 01:45+10:30 02:45+10:30 03:45+10:30",
        ),
        # 23:00 to 24:00 is shown again.
        (BEIRUT, "2026-10-24 21:00", "30 23 * * *", "23:30+03:00"),
        (
            BEIRUT,
            "2026-10-24 21:00",
            "30 * * * *",
            "22:30+03:00 23:30+03:00 23:30+02:00 00:30+02:00",
        ),
        ("UTC", "2026-10-25 01:00", "0 2 * * *", "02:00+00:00"),
    ],
)
def test_hour_that_happens_twice(zone: str, change: str, cron: str, expected: str) -> None:
    assert fires(cron, change, zone) == expected.split()


@pytest.mark.parametrize(
    ("zone", "change", "cron", "expected"),
    [
        # From 02:00 to 03:00.
        (BERLIN, "2026-03-29 01:00", "0 2 * * *", "03:00+02:00"),
        (BERLIN, "2026-03-29 01:00", "59 2 * * *", "03:00+02:00"),
        (BERLIN, "2026-03-29 01:00", "10,20,30 2 * * *", "03:00+02:00"),
        (BERLIN, "2026-03-29 01:00", "0 2,3 * * *", "03:00+02:00"),
        (BERLIN, "2026-03-29 01:00", "30 2,3 * * *", "03:00+02:00 03:30+02:00"),
        (BERLIN, "2026-03-29 01:00", "59 1 * * *", "01:59+01:00"),
        (BERLIN, "2026-03-29 01:00", "0 2 29 * mon", "03:00+02:00"),
        (BERLIN, "2026-03-29 01:00", "0 2 * * mon-sat", ""),
        (BERLIN, "2026-03-29 01:00", "*/20 2 * * *", ""),
        (
            BERLIN,
            "2026-03-29 01:00",
            "0 * * * *",
            "00:00+01:00 01:00+01:00 03:00+02:00 04:00+02:00 05:00+02:00",
        ),
        (NEW_YORK, "2026-03-08 07:00", "15 2 * * *", "03:00-04:00"),
        (
            NEW_YORK,
            "2026-03-08 07:00",
            "15 * * * *",
            "00:15-05:00 01:15-05:00 03:15-04:00 04:15-04:00 05:15-04:00",
        ),
        # From 02:00 to 02:30.
        (LORD_HOWE, "2026-10-03 15:30", "15 2 * * *", "02:30+11:00"),
        (LORD_HOWE, "2026-10-03 15:30", "15,45 2 * * *", "02:30+11:00 02:45+11:00"),
        (
            LORD_HOWE,
            "2026-10-03 15:30",
            "15 * * * *",
            "00:15+10:30 01:15+10:30 03:15+11:00 04:15+11:00",
        ),
        # From 00:00 to 01:00: the day begins with the jump.
        (BEIRUT, "2026-03-28 22:00", "0 0 * * *", "01:00+03:00"),
        (BEIRUT, "2026-03-28 22:00", "30 0 29 3 *", "01:00+03:00"),
        (BEIRUT, "2026-03-28 22:00", "30 0 28 3 *", ""),
        # The 30th never was.
        ("Pacific/Apia", "2011-12-30 10:00", "0 12 30 12 *", "00:00+14:00"),
        ("UTC", "2026-03-29 01:00", "30 2 * * *", "02:30+00:00"),
    ],
)
def test_hour_that_never_happens(zone: str, change: str, cron: str, expected: str) -> None:
    assert fires(cron, change, zone) == expected.split()


@pytest.mark.parametrize("before", [1, 3600, 86_399, 86_400, 86_401])
def test_search_that_begins_near_a_jump(before: int) -> None:
    """A jump at the first or last second of a day of search is seen, and seen once."""
    zone = ZoneInfo(BERLIN)
    jump = utc("2026-03-29 01:00")
    yearly = parse_cron("30 2 29 3 *")
    assert next_fire(yearly, jump - timedelta(seconds=before), zone) == jump
    assert next_fire(yearly, jump, zone) == utc("2027-03-29 00:30")


@pytest.mark.parametrize(("zone", "shift"), [(BERLIN, 60), (NEW_YORK, 60), (LORD_HOWE, 30)])
def test_hourly_job_by_real_time(zone: str, shift: int) -> None:
    """A star runs each real hour of a year; only a half-hour shift moves it against UTC."""
    local = ZoneInfo(zone)
    fields = parse_cron("0 * * * *")
    at = utc("2026-01-01 00:00")
    times = [at := next_fire(fields, at, local) for _ in range(365 * 24)]
    gaps = {later - sooner for sooner, later in pairwise(times)}
    assert gaps == ({HOUR} if shift == 60 else {HOUR, HOUR * 1.5})


def _list(low: int, high: int) -> st.SearchStrategy[str]:
    numbers = st.lists(st.integers(low, high), min_size=1, max_size=3, unique=True)
    return st.one_of(
        st.just("*"),
        st.integers(2, max(2, high // 2)).map("*/{}".format),
        numbers.map(lambda some: ",".join(map(str, some))),
        st.tuples(st.integers(low, high), st.integers(low, high)).map(
            lambda pair: f"{min(pair)}-{max(pair)}"
        ),
    )


# Around the changes of each zone, those at midnight and those of half an hour too.
CHANGES = [
    (BERLIN, "2026-03-29 01:00"),
    (BERLIN, "2026-10-25 01:00"),
    (NEW_YORK, "2026-03-08 07:00"),
    (NEW_YORK, "2026-11-01 06:00"),
    (LORD_HOWE, "2026-04-04 15:00"),
    (LORD_HOWE, "2026-10-03 15:30"),
    (BEIRUT, "2026-03-28 22:00"),
    (BEIRUT, "2026-10-24 21:00"),
    ("America/St_Johns", "2006-04-02 03:31"),
    ("America/St_Johns", "2006-10-29 02:31"),
    ("Pacific/Apia", "2011-12-30 10:00"),
    ("UTC", "2028-02-29 00:00"),
]
CRONS = st.tuples(
    _list(0, 59), _list(0, 5), st.just("*") | _list(1, 28), st.just("*"), st.just("*") | _list(0, 7)
).map(" ".join)
SEARCHED = timedelta(days=1, hours=12)


def brute(fields: CronFields, after: datetime, zone: ZoneInfo) -> datetime | None:
    """The same rule, minute by minute, told as cron tells it: by what the clock shows."""

    def names(wall: datetime) -> bool:
        day = wall.day in fields.day
        weekday = wall.isoweekday() % 7 in fields.weekday
        either = "day" not in fields.starred and "weekday" not in fields.starred
        return (
            wall.minute in fields.minute
            and wall.hour in fields.hour
            and wall.month in fields.month
            and ((day or weekday) if either else (day and weekday))
        )

    real_time = "minute" in fields.starred or "hour" in fields.starred
    at = after.replace(second=0, microsecond=0)
    shown = at.astimezone(zone).replace(tzinfo=None)
    while (at := at + MINUTE) <= after + SEARCHED:
        previous, local = shown, at.astimezone(zone)
        shown = local.replace(tzinfo=None)
        if names(shown) and (real_time or local.fold == 0):
            return at
        skipped = previous + MINUTE
        while not real_time and skipped < shown:
            if names(skipped):
                return at
            skipped += MINUTE
    return None


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CHANGES), st.integers(-36 * 3600, 6 * 3600), CRONS)
@example((BERLIN, "2026-03-29 01:00"), -1, "30 2 * * *")
@example((BERLIN, "2026-10-25 01:00"), -1800, "30 2 * * *")
def test_no_earlier_minute_fits(change: tuple[str, str], seconds: int, cron: str) -> None:
    zone = ZoneInfo(change[0])
    after = utc(change[1]) + timedelta(seconds=seconds)
    try:
        fields = parse_cron(cron)
    except ValueError:  # a step larger than its field
        return
    fire = next_fire(fields, after, zone)
    expected = brute(fields, after, zone)
    assert fire > after
    if expected is None:
        assert fire > after + SEARCHED
    else:
        assert fire == expected


class Clock:
    """The wall clock, for the schedule and for APScheduler."""

    def __init__(self, at: str) -> None:
        self.at = utc(at)

    def __call__(self) -> datetime:
        return self.at

    def set(self, text: str) -> None:
        self.at = utc(text)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock("2026-06-01 11:58")
    # The library takes no clock from outside.
    monkeypatch.setattr(
        "apscheduler.schedulers.base.datetime", SimpleNamespace(now=lambda _zone: clock())
    )
    return clock


class Fired(list[str]):
    """The names that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.called = asyncio.Event()

    def __call__(self, name: str, job: JobConfig) -> None:
        assert job.cron
        self.append(name)
        self.called.set()

    def taken(self) -> list[str]:
        names = sorted(self)
        self.clear()
        return names


@pytest.fixture
def fired() -> Fired:
    return Fired()


Make = Callable[..., Schedule]


@pytest.fixture
async def make(clock: Clock, fired: Fired) -> AsyncIterator[Make]:
    """A started schedule with these jobs: name = cron expression."""
    made = []

    def make(timezone: str = "UTC", **crons: str) -> Schedule:
        jobs = {name: JobConfig(cron=cron) for name, cron in crons.items()}
        schedule = Schedule(ScheduleConfig(timezone=timezone, jobs=jobs), fired, now=clock)
        schedule.start()
        made.append(schedule)
        return schedule

    yield make
    for schedule in made:
        schedule.stop()
    await asyncio.sleep(0)


async def look(schedule: Schedule) -> None:
    """One look at the clock: it's over when the loop has come round."""
    schedule.wakeup()
    await asyncio.sleep(0)


def due(schedule: Schedule) -> list[datetime | None]:
    return [job.next_at for job in schedule.jobs()]


async def test_jobs_fire_at_their_minute(clock: Clock, fired: Fired, make: Make) -> None:
    schedule = make(hourly="0 * * * *", noon="0 12 * * *", later="1 12 * * *")
    clock.set("2026-06-01 11:59:59.999")
    await look(schedule)
    assert fired.taken() == []
    clock.set("2026-06-01 12:00:00.001")
    await look(schedule)
    assert fired.taken() == ["hourly", "noon"]
    await look(schedule)
    assert fired.taken() == []
    clock.set("2026-06-01 12:01")
    await look(schedule)
    assert fired.taken() == ["later"]


async def test_what_the_schedule_tells(clock: Clock, fired: Fired, make: Make) -> None:
    schedule = make(BERLIN, daily="0 14 * * *")
    (before,) = schedule.jobs()
    assert (before.name, before.cron, before.job) == ("daily", "0 14 * * *", "sync")
    assert (before.timezone, before.last_at) == (BERLIN, None)
    assert before.next_at == utc("2026-06-01 12:00")
    clock.set("2026-06-01 12:00:07")
    await look(schedule)
    (after,) = schedule.jobs()
    assert after.next_at == utc("2026-06-02 12:00")
    assert after.last_at == utc("2026-06-01 12:00:07")
    schedule.stop()
    (stopped,) = schedule.jobs()
    assert stopped.next_at is None
    assert stopped.last_at == after.last_at


async def test_sleep_is_caught_up_once(clock: Clock, fired: Fired, make: Make) -> None:
    schedule = make(often="* * * * *", hourly="0 * * * *", yearly="@yearly")
    clock.set("2026-06-08 15:30:20")
    await look(schedule)
    assert fired.taken() == ["hourly", "often"]
    assert due(schedule) == [
        utc("2026-06-08 15:31"),
        utc("2026-06-08 16:00"),
        utc("2027-01-01 00:00"),
    ]
    await look(schedule)
    assert fired.taken() == []


def test_missed_times_are_not_counted_up() -> None:
    """Years of missed minutes are one question, or the loop would stand still."""
    trigger = module._Trigger(parse_cron("* * * * *"), ZoneInfo("UTC"))
    now = utc("2026-06-01 12:00:30")
    assert trigger.get_next_fire_time(utc("1970-01-01"), now) == utc("2026-06-01 12:01")


async def test_clock_set_back_by_an_hour(clock: Clock, fired: Fired, make: Make) -> None:
    schedule = make(hourly="0 * * * *", often="*/10 * * * *", noon="0 12 * * *")
    clock.set("2026-06-01 12:00:01")
    await look(schedule)
    assert fired.taken() == ["hourly", "noon", "often"]
    clock.set("2026-06-01 11:00:10")
    await look(schedule)
    await look(schedule)
    assert fired.taken() == []
    assert due(schedule) == [
        utc("2026-06-01 12:00"),
        utc("2026-06-01 11:10"),
        utc("2026-06-01 12:00"),
    ]
    counted = []
    for _ in range(70):
        clock.at += MINUTE
        await look(schedule)
        counted += fired.taken()
    assert (counted.count("often"), counted.count("hourly"), counted.count("noon")) == (7, 1, 1)


async def test_clock_set_forward_and_right_again(clock: Clock, fired: Fired, make: Make) -> None:
    schedule = make(hourly="0 * * * *")
    clock.set("2036-06-01 11:30")
    await look(schedule)
    assert fired.taken() == ["hourly"]
    clock.set("2026-06-01 11:59")
    await look(schedule)
    assert fired.taken() == []
    clock.set("2026-06-01 12:00")
    await look(schedule)
    assert fired.taken() == ["hourly"]


async def test_clock_corrected_by_seconds(clock: Clock, fired: Fired, make: Make) -> None:
    """Back before the minute that has just fired: it doesn't fire again."""
    schedule = make(hourly="0 * * * *")
    clock.set("2026-06-01 12:00:01")
    await look(schedule)
    assert fired.taken() == ["hourly"]
    for text in ("2026-06-01 11:59:10", "2026-06-01 12:00:00", "2026-06-01 12:00:05"):
        clock.set(text)
        await look(schedule)
    assert fired.taken() == []


async def test_small_steps_back_add_up(clock: Clock, make: Make) -> None:
    schedule = make(often="* * * * *")
    for text in ("11:58:50", "11:58:00", "11:57:40"):
        clock.set(f"2026-06-01 {text}")
        await look(schedule)
    assert due(schedule) == [utc("2026-06-01 11:58")]


async def test_stopped_schedule_fires_nothing(clock: Clock, fired: Fired, make: Make) -> None:
    schedule = make(hourly="0 * * * *")
    clock.set("2026-06-01 12:00")
    schedule.wakeup()
    schedule.stop()
    schedule.stop()
    await look(schedule)
    assert fired.taken() == []
    schedule.start()
    schedule.start()
    assert due(schedule) == [utc("2026-06-01 13:00")]
    clock.set("2026-06-01 13:00")
    await look(schedule)
    assert fired.taken() == ["hourly"]


async def test_broken_callback_stops_nothing(
    clock: Clock, caplog: pytest.LogCaptureFixture, fired: Fired
) -> None:
    def fail(name: str, job: JobConfig) -> None:
        fired.append(name)
        raise LookupError(job.cron)

    jobs = {name: JobConfig(cron="0 * * * *") for name in ("one", "two")}
    schedule = Schedule(ScheduleConfig(jobs=jobs), fail, now=clock)
    schedule.start()
    for text in ("2026-06-01 12:00", "2026-06-01 13:00"):
        clock.set(text)
        await look(schedule)
        assert fired.taken() == ["one", "two"]
    schedule.stop()
    assert "LookupError: 0 * * * *" in caplog.text


async def test_fires_by_itself(fired: Fired) -> None:
    """APScheduler's own timer, on a clock that is just before a full minute."""
    ahead = utc("2026-06-01 11:59:59.9") - datetime.now(UTC)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "apscheduler.schedulers.base.datetime",
            SimpleNamespace(now=lambda _zone: datetime.now(UTC) + ahead),
        )
        config = ScheduleConfig(jobs={"hourly": JobConfig(cron="0 * * * *")})
        schedule = Schedule(config, fired, now=lambda: datetime.now(UTC) + ahead)
        schedule.start()
        async with asyncio.timeout(5):
            await fired.called.wait()
        (job,) = schedule.jobs()
        assert job.last_at is not None
        assert job.last_at >= utc("2026-06-01 12:00")
        schedule.stop()
        await asyncio.sleep(0)


async def test_wakes_up_by_itself(
    clock: Clock, fired: Fired, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module._BEAT <= 30
    monkeypatch.setattr(module, "_BEAT", 0.005)
    make(hourly="0 * * * *")
    for text in ("2026-06-01 15:30", "2026-06-01 16:30", "2026-06-01 17:30"):
        clock.set(text)
        async with asyncio.timeout(5):
            await fired.called.wait()
        fired.called.clear()
        assert fired.taken() == ["hourly"]


def test_zones_of_a_machine_without_any() -> None:
    # As in a slim image: no /usr/share/zoneinfo to look into.
    code = f"import zoneinfo; print(zoneinfo.TZPATH, zoneinfo.ZoneInfo({BERLIN!r}))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONTZPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == f"() {BERLIN}\n", found.stderr


@pytest.mark.parametrize(
    ("crons", "hours"),
    [
        (["0 * * * *", "0 2 * * *"], 1),
        (["0 2 * * *"], 24),
        (["*/15 * * * *"], 0.25),
        (["* 9-16 * * *"], 24 - 7 - 59 / 60),
        (["0 2 * * mon-fri"], 72),
        (["0 6 * * *", "0 20 * * *"], 14),
        (["0 2,16 * * *"], 14),
        (["0 0 1-5 * *"], 27 * 24),
        (["0 0 1 jan,feb *"], (365 - 31) * 24),
        (["@yearly"], 365 * 24),
        (["@yearly", "@hourly"], 1),
        (["0 0 29 2 *"], math.inf),
        ([], math.inf),
    ],
)
@pytest.mark.parametrize("day", ["2026-01-01", "2026-03-29", "2026-06-17", "2026-10-25"])
def test_planned_interval(crons: list[str], hours: float, day: str) -> None:
    jobs = {f"job{number}": JobConfig(cron=cron) for number, cron in enumerate(crons)}
    jobs["check"] = JobConfig(cron="* * * * *", job="verify")
    schedule = Schedule(ScheduleConfig(timezone=BERLIN, jobs=jobs), Fired())
    assert schedule.planned_interval(utc(day)) == pytest.approx(hours * 3600)
