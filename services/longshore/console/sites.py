"""The commands about rollout sites."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from longshore.api_types import IssuedCredential, SiteCredentialView
from longshore.client import ApiClient
from longshore.client.answers import checked_url
from longshore.console.commands import open_client
from longshore.console.follow import EXIT_OK
from longshore.console.tables import aligned
from longshore.errors import Conflict
from longshore.sites.authority import Authority, write_private
from longshore.sites.certificates import make_request
from longshore.sites.credential_file import SiteCredential


async def join(name: str, project: str | None, days: float, out: Path) -> int:
    """Writes the site's file. Raises Conflict: there is such a file, which may be a relay's that runs."""
    if await asyncio.to_thread(out.exists):
        raise Conflict(f"{out} exists: name another file with --out, or take it away")
    key, request = make_request(name)
    async with open_client() as client:
        issued = await client.join_site(name, request.decode(), project, days)
    assert issued["broker_url"] is not None
    assert issued["api_key"] is not None
    _credential(issued, key, issued["broker_url"], issued["api_key"]).save(out)
    sys.stdout.write(f"{out}\n")
    sys.stdout.flush()
    sys.stderr.write(
        f"site {name} may take part in {_jobs(project)} until {issued['expires_at']}. Bring the file to the site by a "
        f"way that keeps it secret, and start its relay with LONGSHORE_SITE_FILE={out}, or:\n"
        f"  kubectl create secret generic {name}-site --from-file=site.json={out}\n"
        "  helm install ... --set profile=rollout-site,"
        f"site.name={name},site.home.credentialSecret={name}-site\n"
    )
    return EXIT_OK


async def renew(file: Path) -> int:
    """Replaces the file as a whole; a relay that uses it sees that by itself."""
    old = SiteCredential.load(file)
    key, request = make_request(old.site)
    url = checked_url(old.gateway, f"gateway in {file}:")
    async with ApiClient(url, old.api_key.get_secret_value()) as client:
        issued = await client.renew_site(old.site, request.decode())
    _credential(issued, key, old.broker_url.get_secret_value(), old.api_key.get_secret_value()).save(file)
    sys.stdout.write(f"{file}: good until {issued['expires_at']}\n")
    return EXIT_OK


async def revoke(name: str) -> int:
    """Puts a site out."""
    async with open_client() as client:
        await client.revoke_site(name)
    sys.stdout.write(f"site {name} is out: its certificates, its user at the broker and its key are good no more\n")
    return EXIT_OK


async def list_sites(as_json: bool) -> int:
    """Prints one line a site."""
    async with open_client() as client:
        found = (await client.joined_sites())["sites"]
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    elif found:
        rows = [("SITE", "PROJECT", "STATE", "EXPIRES", "LEFT"), *(_row(item) for item in found)]
        sys.stdout.write("".join(f"{line}\n" for line in aligned(rows)))
    else:
        sys.stderr.write("no sites yet; let one in with `longshore site join NAME`\n")
    return EXIT_OK


def home_certificate(names: Sequence[str], authority: Path, out: Path, days: float) -> int:
    """Writes tls.crt, tls.key and ca.crt, the files of a Kubernetes secret for TLS. Raises ConfigError.

    Args:
        names: at least one.
    """
    signer = Authority.open(authority)
    certificate, key = signer.issue_home(names, days)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(out / "tls.key", key)
    for name, data in (("tls.crt", certificate), ("ca.crt", signer.pem)):
        (out / name).write_bytes(data)
    sys.stdout.write(f"{out}: tls.crt, tls.key and ca.crt for {', '.join(names)}\n")
    return EXIT_OK


def _credential(issued: IssuedCredential, key: bytes, broker_url: str, api_key: str) -> SiteCredential:
    return SiteCredential.model_validate(
        {
            "site": issued["site"],
            "project": issued["project"],
            "weights": issued["weights"],
            "broker_url": broker_url,
            "gateway": issued["gateway"],
            "api_key": api_key,
            "authority": issued["authority"],
            "certificate": issued["certificate"],
            "private_key": key.decode(),
        }
    )


def _jobs(project: str | None) -> str:
    return f"jobs of project {project}" if project is not None else "every project's jobs"


def _row(item: SiteCredentialView) -> tuple[str, ...]:
    left = (datetime.fromisoformat(item["expires_at"]) - datetime.now(UTC)).total_seconds() / 86_400.0
    shown = f"{left:.1f} days" if item["state"] in ("good", "expiring") else "-"
    return item["site"], item["project"] or "*", item["state"], item["expires_at"], shown
