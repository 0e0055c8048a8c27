"""Pooled connections: what they bring along each time they are borrowed."""

from pydantic import SecretStr

from balancesync.config import PostgresConfig
from balancesync.database import Database


async def test_a_pooled_connection_keeps_its_settings(postgres_dsn: str) -> None:
    database = Database(PostgresConfig(dsn=SecretStr(postgres_dsn), pool_size=1))
    try:
        for _ in range(2):
            async with database.acquire() as connection:
                assert await connection.fetchval("SHOW application_name") == "balancesync"
                # In milliseconds, as a number or with a unit: versions differ. 0 if it's unset.
                assert (await connection.fetchval("SHOW tcp_user_timeout")).startswith("7")
    finally:
        await database.close()


async def test_a_transaction_left_open_is_rolled_back(postgres_dsn: str) -> None:
    database = Database(PostgresConfig(dsn=SecretStr(postgres_dsn), pool_size=1))
    try:
        async with database.acquire() as connection:
            await connection.execute("BEGIN; CREATE TABLE left_open (id int)")
        async with database.acquire() as connection:
            assert not connection.is_in_transaction()
            assert await connection.fetchval("SELECT to_regclass('left_open')") is None
    finally:
        await database.close()
