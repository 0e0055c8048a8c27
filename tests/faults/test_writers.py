"""Several writers at once: one applies at a time, and nobody puts an older value over a newer."""

import asyncio
from pathlib import Path

import asyncpg

from faults.forked import Forked
from faults.ground import SMALL, Ground

AUDIT = """
    CREATE TABLE audit (n bigserial, pid int, key bigint, old numeric, new numeric);
    CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO audit (pid, key, old, new)
        VALUES (pg_backend_pid(), NEW.user_id, OLD.balance, NEW.balance);
        RETURN NULL;
    END $$;
    CREATE TRIGGER audit AFTER INSERT OR UPDATE ON balances FOR EACH ROW EXECUTE FUNCTION audit()
"""
# Whoever writes again after somebody else has written in between.
TURNS = """
    SELECT count(*) AS turns, count(DISTINCT pid) AS writers
    FROM (SELECT pid, lag(pid) OVER (ORDER BY n) AS before FROM audit) AS a
    WHERE before IS DISTINCT FROM pid
"""


async def test_two_writers_started_at_once(
    ground: Ground,
    pg: asyncpg.Connection,
    postgres_dsn: str,
    *,
    tmp_path: Path,
    torture: bool,
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        f'[redis]\nurl = "{ground.url}"\nscan_count = {SMALL["redis"]["scan_count"]}\n'
        f'[postgres]\ndsn = "{postgres_dsn}"\napply_batch = {SMALL["postgres"]["apply_batch"]}\n'
    )
    await pg.execute(AUDIT)
    both = 0
    for _ in range(100 if torture else 10):
        await pg.execute("TRUNCATE audit")
        async with ground.application.at_work():
            pair = [
                Forked(tmp_path / f"log{number}", "sync", "--config", str(config), "--wait", "30")
                for number in range(2)
            ]
            ground.figures.fault()
            for code in await asyncio.gather(*(process.ended() for process in pair)):
                assert code == 0, [process.log.read_text() for process in pair]
            await ground.prove(pg)
        found = await pg.fetchrow(TURNS)
        assert found is not None
        # Each has its turn once, the engine that proves it included.
        assert found["turns"] == found["writers"]
        both += found["writers"] > 1
        backwards = await pg.fetchval("SELECT count(*) FROM audit WHERE new <= old")
        ground.figures.checked(await pg.fetchval("SELECT count(*) FROM audit"), backwards)
        assert not backwards
    assert both
