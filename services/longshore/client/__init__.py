"""The REST API as a program sees it, typed: `Client` for plain code, `ApiClient` for asyncio; the CLI uses the latter.

with Client("http://127.0.0.1:8300", key) as client:
    job = client.submit({"name": "first-light", ...})
    for event in client.events(job["id"]):
        ...

Every method is named as its operation in docs/openapi.json, and returns what that describes (longshore.api_types).
Every error is a LongshoreError with one clear sentence: InvalidJobSpec, NotFound, Conflict, Forbidden, Unavailable.
"""

from longshore.client.async_client import ApiClient, connect
from longshore.client.sync_client import Client

__all__ = ["ApiClient", "Client", "connect"]
