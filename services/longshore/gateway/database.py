"""The gateway's database: SQLite in a file, or Postgres. Opened, brought up to date by migrations, used, closed.

One transaction a block; nothing is cached. Knows no table's meaning.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, RowMapping, Select, create_engine, event
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from longshore.errors import ConfigError, Unavailable

# The revision that tables have which were made before there were migrations.
_FIRST = "0001"
# Any number will do that no other program takes for its own lock in the same database.
_MIGRATION_LOCK = 0x4C53_4D49
_BUSY_MS = 10_000
# Of one gateway. A stream of events takes one only while it reads.
_POOL_SIZE = 10
_WAIT_S = 30.0
# Of SQLite at a time; they share the processor with everything else here.
_READERS = 4


class Database:
    """Open it before use, close it after."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError: nothing can be made of the URL."""
        try:
            self._engine: AsyncEngine = create_async_engine(url, **_options(url))
        except (ArgumentError, ModuleNotFoundError) as error:
            raise ConfigError(f"LONGSHORE_DATABASE_URL: {error}") from None
        # SQLite's reads go through threads of our own, one trip each: its asyncio driver makes six of a query.
        self._reader: Engine | None = None
        self._threads = _threads()
        self._writing = asyncio.Lock()
        if self.dialect == "sqlite":
            event.listen(self._engine.sync_engine, "connect", _prepare_sqlite)
            # A database in memory is one connection's alone.
            if self._engine.url.database:
                self._reader = create_engine(self._engine.url.set(drivername="sqlite"), pool_size=_READERS)
                event.listen(self._reader, "connect", _prepare_sqlite)

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._engine.dialect.name

    async def open(self) -> None:
        """Brings the tables up to date, in one transaction; of gateways that start together, one does it.

        Raises:
            Unavailable: the database is away.
            ConfigError: a newer Longshore has used it.
        """
        async with self.connected() as connection:
            if self.dialect == "sqlite":
                await connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
            await connection.run_sync(_migrate)

    async def close(self) -> None:
        """Lets go of every connection and thread; whoever asks once more gets new ones."""
        await self._engine.dispose()
        if self._reader is not None:
            await asyncio.to_thread(self._reader.dispose)
        self._threads.shutdown(wait=False)
        self._threads = _threads()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """SQLite has one writer at a time and no queue for the others: here they come in turn. Raises Unavailable."""
        if self.dialect != "sqlite":
            yield
            return
        try:
            async with asyncio.timeout(_WAIT_S):
                await self._writing.acquire()
        except TimeoutError:
            raise Unavailable(f"the job database was busy for {_WAIT_S:.0f} s") from None
        try:
            yield
        finally:
            self._writing.release()

    async def rows(self, query: Select[Any]) -> Sequence[RowMapping]:
        """What one query finds. Raises Unavailable as `connected` does."""
        if self._reader is None:
            async with self.connected() as connection:
                found: Sequence[RowMapping] = (await connection.execute(query)).mappings().all()
                return found
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, self._reader, query)

    def _read(self, reader: Engine, query: Select[Any]) -> Sequence[RowMapping]:
        try:
            with reader.connect() as connection:
                return connection.execute(query).mappings().all()
        except (OperationalError, sqlalchemy.exc.TimeoutError) as error:
            raise _unavailable(error) from None

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[AsyncConnection]:
        """One transaction. Raises Unavailable while the database cannot be used: its disk is full, it is away."""
        try:
            async with self._turn(), self._engine.begin() as connection:
                yield connection
        except (OperationalError, InterfaceError, OSError, sqlalchemy.exc.TimeoutError) as error:
            raise _unavailable(error) from None
        except DBAPIError as error:
            # A server that goes while it is asked: Postgres says so by its own kind of error.
            if not error.connection_invalidated:
                raise
            raise _unavailable(error) from None


def _threads() -> ThreadPoolExecutor:
    """Has no thread before it is used."""
    return ThreadPoolExecutor(_READERS, thread_name_prefix="database")


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable(f"the job database cannot be used: {getattr(error, 'orig', None) or error}")


def _options(url: str) -> dict[str, Any]:
    if url.startswith("sqlite"):
        return {}
    return {"pool_size": _POOL_SIZE, "max_overflow": _POOL_SIZE, "pool_timeout": _WAIT_S, "pool_pre_ping": True}


def _migrate(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", "longshore.gateway:migrations")
    config.attributes["connection"] = connection
    has_tables = sqlalchemy.inspect(connection).has_table("jobs")
    present = MigrationContext.configure(connection).get_current_revision()
    if has_tables and present is None:
        command.stamp(config, _FIRST)
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise ConfigError(
            f"LONGSHORE_DATABASE_URL: its tables have revision {present}, which this version of Longshore does not "
            f"know: {error}. Use the version that made them, or a newer one"
        ) from None


def _prepare_sqlite(connection: Any, record: object) -> None:
    with contextlib.closing(connection.cursor()) as cursor:
        # Readers go on while one writes; a second writer waits.
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        cursor.execute("PRAGMA foreign_keys=ON")
