"""What Alembic runs: the migrations on the connection that `Database.open` hands over."""

from __future__ import annotations

from alembic import context

from longshore.gateway.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
# The transaction is the caller's: all of the migrations, or none.
context.run_migrations()
