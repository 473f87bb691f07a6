"""The commands about API keys."""

from __future__ import annotations

import json
import sys

from longshore.api_types import ApiKeyView, NewApiKey
from longshore.console.commands import open_client
from longshore.console.follow import EXIT_OK
from longshore.console.tables import aligned


async def list_keys(as_json: bool) -> int:
    """Prints one line a key."""
    async with open_client() as client:
        found = (await client.keys())["keys"]
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    elif found:
        rows = [("ID", "PROJECT", "ROLE", "EXPIRES", "NAME"), *(_row(key) for key in found)]
        sys.stdout.write("".join(f"{line}\n" for line in aligned(rows)))
    else:
        sys.stderr.write("no keys yet; make one with `longshore keys create`\n")
    return EXIT_OK


async def create(role: str, project: str | None, name: str, days: float) -> int:
    """Prints the key alone on stdout, for scripts; what it is goes to stderr."""
    async with open_client() as client:
        return _show(await client.create_key(role, project, name, days))


async def rotate(key_id: str, grace_s: float) -> int:
    """Prints the new key, as `create` does."""
    async with open_client() as client:
        return _show(await client.rotate_api_key(key_id, grace_s))


async def revoke(key_id: str) -> int:
    """Ends a key."""
    async with open_client() as client:
        await client.revoke_key(key_id)
    sys.stdout.write(f"key {key_id} is revoked\n")
    return EXIT_OK


def _show(key: NewApiKey) -> int:
    sys.stdout.write(f"{key['key']}\n")
    sys.stdout.flush()
    project = key["project"] or "every project"
    until = f"until {key['expires_at']}" if key["expires_at"] else "for ever"
    sys.stderr.write(f"key {key['id']}: {key['role']} of {project}, {until}; it is shown this once\n")
    return EXIT_OK


def _row(key: ApiKeyView) -> tuple[str, ...]:
    return key["id"], key["project"] or "*", key["role"], key["expires_at"] or "never", key["name"]
