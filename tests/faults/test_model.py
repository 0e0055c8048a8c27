"""Whatever happens to Redis and to the servers, in whatever order: the promises hold at each step.

Beside the real servers goes a model of what Redis holds, what the guard must remember, and what
PostgreSQL may show. Hypothesis makes the stories up, and shortens one that ends badly.
"""

import asyncio
from collections.abc import Callable, Coroutine
from decimal import Decimal
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
from engine import Engine, make_config
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from proxy import Proxy
from redis import Redis as BlockingRedis

from balancesync.embedded import PostgresServer, RedisServer
from balancesync.model import Baseline, Request, Run
from balancesync.part import Progress
from balancesync.sync import Sync
from faults.figures import Figures
from faults.ground import GAPS, RETRY, STILL_RUNNING, connected, through, until_free
from faults.ledger import Ledger

T = TypeVar("T")

KEYS = 40
# Few of them or nearly all.
KEY_SETS = st.one_of(
    st.sets(st.integers(0, KEYS - 1), min_size=1, max_size=5),
    st.sets(st.integers(0, KEYS - 1), max_size=8).map(lambda left: {*range(KEYS)} - left),
)
STEPS = st.integers(1, 60)
SPOILED = ("", "1,5", "NaN", "1.005", "abc", "1e30")

UNFINISHED = """
    SELECT coalesce((SELECT status <> 'succeeded' FROM balancesync.runs
        WHERE job = 'restore' AND mode = 'apply' ORDER BY id DESC LIMIT 1), false)
"""


class Story(RuleBasedStateMachine):
    """One story; `held` is what Redis holds: None for what is no balance."""

    def __init__(
        self, postgres: PostgresServer, redis: RedisServer, figures: Figures, on_absent: str
    ) -> None:
        super().__init__()
        self.on_absent = on_absent
        self.unfinished = False
        self.postgres = postgres
        self.server = redis
        self.figures = figures
        self.held: dict[int, Decimal | None] = {}
        self.rows: dict[int, Decimal] = {}
        self.baseline = Baseline(0, 0)
        self.pruned: set[int] = set()
        self.standing = False
        # Redis has been empty since the last success, and tells so.
        self.emptied = False
        # It was started anew, with all keys, and may or may not be able to prove that.
        self.restarted = False
        self.ledger = Ledger(KEYS, figures)
        self.last: Run | None = None
        self.runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.client = BlockingRedis.from_url(redis.url)
        self.client.flushall()
        self.before, self.source = Proxy(postgres.port), Proxy(redis.port)
        self.wait(self.begin())
        self.pay(set(range(KEYS)))
        self.sync_undisturbed()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        async def limited() -> T:
            async with asyncio.timeout(60):
                return await work

        return self.runner.run(limited())

    async def begin(self) -> None:
        async with connected(self.postgres.dsn) as pg:
            await pg.execute("DROP SCHEMA IF EXISTS balancesync CASCADE")
            await pg.execute("DROP TABLE IF EXISTS balances")
        await self.before.accept()
        await self.source.accept()
        self.engine = Engine(
            make_config(
                through(self.postgres.dsn, self.before),
                f"redis://127.0.0.1:{self.source.port}/0",
                {"on_absent": self.on_absent},
                history={"enabled": self.on_absent == "delete"},
                prune={"enabled": True},
                redis={"scan_count": 5},
                postgres={"apply_batch": 5},
                retry=RETRY,
            )
        )

    def teardown(self) -> None:
        async def end() -> None:
            await self.engine.close()
            await self.before.refuse()
            await self.source.refuse()

        self.wait(end())
        self.runner.close()
        self.client.close()

    # --- what an application does, and what happens to Redis ---

    @rule(keys=KEY_SETS)
    def pay(self, keys: set[int]) -> None:
        for name, value in self.ledger.write(sorted(keys)).items():
            self.client.set(name, value)
            self.held[int(name.rpartition(":")[2])] = Decimal(value)

    @rule(keys=KEY_SETS, value=st.sampled_from(SPOILED))
    def spoil(self, keys: set[int], value: str) -> None:
        self.figures.fault()
        for key in keys:
            self.client.set(f"balance:{key}", value)
            self.held[key] = None

    @rule(keys=KEY_SETS)
    def delete(self, keys: set[int]) -> None:
        self.figures.fault()
        for key in keys:
            self.client.delete(f"balance:{key}")
            self.held.pop(key, None)

    @rule()
    def flush(self) -> None:
        self.figures.fault()
        self.client.flushall()
        self.held, self.emptied = {}, True

    @rule(keys=KEY_SETS)
    def start_again_from_zero(self, keys: set[int]) -> None:
        """A loss that a run has seen, and an application that goes on without its balances."""
        self.flush()
        self.sync_undisturbed()
        self.pay(keys)
        self.sync_undisturbed()

    @rule(keys=KEY_SETS)
    def bring_back(self, keys: set[int]) -> None:
        """What PostgreSQL has is put back."""
        for key in keys & self.rows.keys():
            self.client.set(f"balance:{key}", str(int(self.rows[key])))
            self.held[key] = self.rows[key]

    @rule()
    def restart_redis(self) -> None:
        self.server.kill()
        self.server.start()
        # It counts anew, and has every change in its file: of few changes that's proven, of many
        # nobody knows whether a FLUSHALL was among them.
        self.emptied, self.restarted = False, True

    # --- runs ---

    @rule()
    def sync_undisturbed(self) -> None:
        self.judge(self.execute(), done=True)

    @rule()
    def accept(self) -> None:
        run = self.execute(accept_loss=True)
        assert run.status == "succeeded"
        self.succeeded()

    @rule(step=STEPS, fault=st.sampled_from(["reset", "lose_next_reply", "kill"]))
    def sync_while_postgres_fails(self, step: int, fault: str) -> None:
        act = self.kill_postgres if fault == "kill" else getattr(self.before, fault)
        self.before.at_step(step, act)
        self.judge(self.execute(), done=False)

    @rule(step=STEPS, fault=st.sampled_from(["reset", "lose_next_reply", "kill"]))
    def sync_while_redis_fails(self, step: int, fault: str) -> None:
        act = self.restart_redis if fault == "kill" else getattr(self.source, fault)
        self.source.at_step(1 + step // 3, act)
        self.judge(self.execute(), done=False)

    @rule(batch=st.integers(1, 8))
    def sync_while_redis_is_flushed(self, batch: int) -> None:
        flushed = False

        def on_progress(progress: Progress) -> None:
            nonlocal batch, flushed
            batch -= progress.phase == "scan"
            if not batch and not flushed and self.held:
                flushed = True
                self.flush()

        run = self.execute(on_progress=on_progress)
        # It has read again what is left then: nothing.
        assert not flushed or run.attempts > 1
        self.judge(run, done=True)

    @rule()
    def verify(self) -> None:
        run = self.execute(job="verify", mode="verify")
        assert run.status == "succeeded"
        good = {key: value for key, value in self.held.items() if value is not None}
        assert run.counts.updated == sum(
            key in self.rows and self.rows[key] != value for key, value in good.items()
        )
        assert run.counts.inserted == len(good.keys() - self.rows.keys())
        self.figures.checked(len(good), 0)

    @rule(overwrite=st.booleans(), step=STEPS, fault=st.sampled_from(["", "reset", "kill"]))
    def restore(self, step: int, fault: str, *, overwrite: bool) -> None:
        if not self.rows:
            return
        differing = {
            key for key, value in self.held.items() if key in self.rows and self.rows[key] != value
        }
        if fault:
            act = self.restart_redis if fault == "kill" else self.source.reset
            self.source.at_step(1 + step // 6, act)
        run = self.execute(job="restore", overwrite=overwrite)
        before = self.read()
        # A key holds what it held, or what its row holds, and none is gone.
        for key, value in self.held.items():
            assert value in (before.get(key), self.rows.get(key))
        assert self.held.keys() >= before.keys()
        if run.status == "succeeded":
            assert overwrite or not differing
            assert self.held == before | self.rows
            known = self.baseline
            more = max(len(self.rows) - known.present, 0)
            self.baseline = Baseline(known.present + more, max(known.absent - more, 0))
            self.pruned, self.standing, self.emptied = set(), False, False
            self.restarted = False
        else:
            assert run.status == "failed"
            assert fault or (differing and not overwrite)

    @rule(step=STEPS, fault=st.sampled_from(["", "", "reset", "kill"]))
    def prune(self, step: int, fault: str) -> None:
        if self.on_absent == "delete":
            return
        same = {key for key, value in self.held.items() if value == self.rows.get(key, Decimal(-1))}
        if fault:
            act = self.restart_redis if fault == "kill" else self.source.reset
            self.source.at_step(1 + step // 3, act)
        run = self.execute(job="prune", idle_s=0.0)
        before = self.read()
        gone = before.keys() - self.held.keys()
        # Only what its row holds goes, each written down before, and the others are left alone.
        assert gone <= same
        assert self.held == {key: value for key, value in before.items() if key not in gone}
        noted = self.wait(self.noted()) - self.pruned
        assert gone <= noted
        assert len(noted - gone) <= (run.status != "succeeded")
        self.pruned |= noted
        if run.status == "succeeded":
            assert gone == same
        elif self.standing:
            assert run.status == "refused" or fault
        else:
            assert run.status == "failed"
            assert fault or self.unfinished

    def read(self) -> dict[int, Decimal | None]:
        """Take `held` from Redis itself; gives what it was before."""
        texts = self.client.mget([f"balance:{key}" for key in range(KEYS)])
        before, self.held = self.held, {}
        for key, text in enumerate(texts):
            if text is not None:
                plain = text.decode() if isinstance(text, bytes) else text
                self.held[key] = None if plain in SPOILED else Decimal(plain)
        return before

    async def noted(self) -> set[int]:
        """The keys that are written down as pruned."""
        async with connected(self.postgres.dsn) as pg:
            return {
                int(row["key"][0]) for row in await pg.fetch("SELECT key FROM balancesync.pruned")
            }

    def kill_postgres(self) -> None:
        self.postgres.kill()
        self.postgres.start()

    def execute(
        self, on_progress: Callable[[Progress], None] = lambda progress: None, **request: Any
    ) -> Run:
        engine = self.engine

        async def execute() -> Run:
            sync = Sync(engine.config, engine.database, engine.source, on_progress)
            return await sync.run(Request(**{"job": "sync", "trigger": "cli", **request}))

        run = self.wait(execute())
        self.before.forget_steps()
        self.source.forget_steps()
        self.figures.ran()
        self.last = run
        return run

    # --- the model ---

    def refusal(self, *, in_doubt: bool) -> bool:
        """Whether the guard must refuse, as SPEC says it in words, with or without a proof that
        Redis wasn't empty."""
        away = len(self.pruned - self.held.keys())
        known, before = self.baseline.present - away, self.baseline.absent + away
        if known <= 0:
            # What was written since a success that knew of nothing, or of the pruned alone.
            known = max(len(self.rows) - before, 0)
        if not known:
            return False
        if not self.held:
            return True
        absent = len(self.rows.keys() - self.held.keys())
        rows = min(max(absent - before, 0), known)
        lost = max(rows, known - len(self.held))
        changed = sum(
            value is not None and key in self.rows and self.rows[key] != value
            for key, value in self.held.items()
        )
        made_anew = changed if self.standing or in_doubt else 0
        if self.standing and rows + made_anew:
            return True
        return 2 * (lost + made_anew) > known

    def judge(self, run: Run, *, done: bool) -> None:
        """Compare what came of a run with what had to; `done` if nothing had disturbed it."""
        must = self.refusal(in_doubt=self.emptied)
        may = must or (self.restarted and self.refusal(in_doubt=True))
        if must or (may and run.status == "refused"):
            # A fault may have ended it before the guard was asked, and only that.
            assert run.status == "refused" or (not done and run.status == "failed"), run
            self.standing |= run.status == "refused"
        elif run.status == "succeeded":
            self.succeeded()
        else:
            assert not done, run
            assert run.status == "failed"

    def succeeded(self) -> None:
        self.rows |= {key: value for key, value in self.held.items() if value is not None}
        gone = self.rows.keys() - self.held.keys()
        if self.on_absent == "delete" and not self.unfinished:
            self.rows = {key: value for key, value in self.rows.items() if key not in gone}
        absent = len(self.rows.keys() - self.held.keys())
        self.baseline, self.standing = Baseline(len(self.held), absent), False
        self.pruned, self.emptied, self.restarted = set(), False, False

    @invariant()
    def holds(self) -> None:
        if self.last is not None:
            self.wait(self.look(self.last))

    async def look(self, last: Run) -> None:
        async with connected(self.postgres.dsn) as pg:
            found = {
                row["user_id"]: row["balance"]
                for row in await pg.fetch("SELECT user_id, balance FROM balances")
            }
            if last.status == "failed" and last.job == "sync":
                # Some slices may be in: each row has its old or its new balance, or is deleted.
                gone = self.rows.keys() - found.keys()
                assert self.on_absent == "delete" or not gone
                assert not gone & self.held.keys()
                for key, balance in found.items():
                    assert balance in (self.rows.get(key), self.held.get(key))
                self.rows = found
            assert found == self.rows
            self.ledger.forget_but(found)
            await self.ledger.check(pg)
            self.unfinished = await pg.fetchval(UNFINISHED)
            if self.on_absent == "delete":
                assert not await pg.fetchval(GAPS)
            await until_free(pg)
            assert not await pg.fetchval(STILL_RUNNING)
            status = await pg.fetchval("SELECT status FROM balancesync.runs WHERE id = $1", last.id)
            # A run that failed before it could begin isn't recorded by a command.
            assert status == last.status or (
                last.status == "failed" and status in (None, "interrupted")
            )
            standing = await pg.fetchval("SELECT refusal IS NOT NULL FROM balancesync.baselines")
            assert standing == self.standing
            if last.status == "succeeded" and last.mode == "apply" and last.job == "sync":
                bad = await pg.fetchval(
                    "SELECT count(*) FROM balancesync.rejects WHERE healed_at IS NULL"
                )
                assert bad == last.counts.rejected
                assert last.counts.scanned == last.counts.seen


@pytest.mark.parametrize("on_absent", ["keep", "delete"])
def test_every_story_ends_well(
    frail_postgres: PostgresServer,
    private_redis: Callable[..., RedisServer],
    figures: Figures,
    *,
    on_absent: str,
    torture: bool,
) -> None:
    redis = private_redis({"appendonly": "yes", "appendfsync": "always"})

    class Told(Story):
        def __init__(self) -> None:
            super().__init__(frail_postgres, redis, figures, on_absent)

    run_state_machine_as_test(
        Told,
        settings=settings(
            max_examples=40 if torture else 6,
            stateful_step_count=30 if torture else 10,
            derandomize=not torture,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
