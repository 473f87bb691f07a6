"""A site's mirror as a process that can be killed. Arguments: folder, project, job, public key in hex, home, listen."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from mirrored_site import MirroredSite

from longshore.types import JobRef


async def main() -> None:
    folder, project, job, public_key, home, listen = sys.argv[1:]
    site = MirroredSite(Path(folder), JobRef(project, job), bytes.fromhex(public_key), home, listen)
    await site.start()
    await asyncio.Event().wait()


asyncio.run(main())
