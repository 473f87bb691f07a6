"""The commands and their arguments. Each imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from cyclopts import App, Parameter
from cyclopts.validators import Number

import longshore

if TYPE_CHECKING:
    from longshore.console.screen import Screen

Service = Literal["actor", "gateway", "generator", "learner", "relay", "verifier", "weights"]
JobFile = Annotated[Path, Parameter(help="YAML or JSON file with a JobSpec, for example examples/first-light.yaml.")]
Seed = Annotated[int | None, Parameter(help="Use this seed instead of the file's.")]
Port = Annotated[
    int,
    Parameter(help="Port of the REST API on 127.0.0.1; 0 takes any free one.", validator=Number(gte=0, lte=65535)),
]
AsJson = Annotated[bool, Parameter(help="Print JSON for programs.", negative="")]
LetterId = Annotated[str, Parameter(help="The id that `dead-letters list` prints.")]
Served = Annotated[Service, Parameter(env_var="LONGSHORE_SERVICE")]
Waiting = Annotated[
    Literal["actor", "generator", "learner", "verifier"], Parameter(env_var="LONGSHORE_SERVICE", help="What it runs.")
]
Home = Annotated[str, Parameter(help="Only for a relay: host:port of its home site's weight store.")]
JobId = Annotated[str, Parameter(help="The id that `submit` printed.")]

app = App(
    name="longshore",
    help="Reinforcement learning with verifiable rewards for language models.",
    version=longshore.__version__,
    result_action="return_value",
)


@app.command(sort_key=1)
def run(job_file: JobFile, /, *, seed: Seed = None) -> int:
    """Train one job on this machine from start to end: up, submit, watch and down in one."""
    from longshore.console import interrupt, local

    document = local.load_checked(job_file, seed)
    screen = _screen()
    return interrupt.run_interruptible(lambda signals: local.run(job_file, document, screen, signals))


@app.command(sort_key=2)
def up(
    *,
    detach: Annotated[bool, Parameter(help="Return once it is up; `longshore down` stops it.", negative="")] = False,
    port: Port = 0,
) -> int:
    """Start the stack of this directory (broker, weights, gateway) and keep it running."""
    from longshore.console import interrupt, local

    screen = _screen()
    if detach:
        return _await(local.up_detached(port, screen))
    return interrupt.run_interruptible(lambda signals: local.up(port, screen, signals))


@app.command(sort_key=3)
def down() -> int:
    """Stop the stack of this directory and everything that it runs."""
    from longshore.console import local

    return _await(local.down(_screen()))


@app.command(sort_key=4)
def submit(job_file: JobFile, /, *, seed: Seed = None) -> int:
    """Give the running stack a job, and print the job's id."""
    from longshore.console import commands, local

    return _await(commands.submit(local.load_with_seed(job_file, seed)))


@app.command(sort_key=5)
def jobs() -> int:
    """List the newest jobs."""
    from longshore.console import commands

    return _await(commands.jobs())


@app.command(sort_key=6)
def watch(job_id: JobId, /) -> int:
    """Show a job's progress until it ends. Ctrl-C ends the watching, not the job."""
    from longshore.console import commands

    return _await(commands.watch(job_id, _screen()))


@app.command(sort_key=7)
def logs(
    job_id: JobId,
    /,
    *,
    service: Annotated[str | None, Parameter(help="Only this service's processes, for example actor.")] = None,
    follow: Annotated[bool, Parameter(alias="-f", help="Go on until the job has ended.", negative="")] = False,
    tail: Annotated[int, Parameter(help="How many lines of each process to begin with.")] = 200,
) -> int:
    """Print the logs of a job's processes."""
    from longshore.console import commands

    return _await(commands.logs(job_id, service, tail, follow))


@app.command(sort_key=8)
def cancel(job_id: JobId, /) -> int:
    """End a job early; what it has learned so far is kept."""
    from longshore.console import commands

    return _await(commands.cancel(job_id))


@app.command(sort_key=8)
def pause(job_id: JobId, /) -> int:
    """Stop a job's processes after a checkpoint; `longshore resume` has it go on."""
    from longshore.console import commands

    return _await(commands.pause(job_id))


@app.command(sort_key=8)
def resume(job_id: JobId, /) -> int:
    """Have a paused job go on from its newest checkpoint."""
    from longshore.console import commands

    return _await(commands.resume(job_id))


@app.command(sort_key=8)
def fork(
    job_id: JobId,
    /,
    *,
    version: Annotated[int | None, Parameter(help="Policy version to begin with; the newest by default.")] = None,
    changes: Annotated[
        Path | None, Parameter(help="YAML or JSON file with the settings that differ from the parent's.")
    ] = None,
) -> int:
    """Give the running stack a new job that begins with a policy version of another one."""
    from longshore.console import commands

    return _await(commands.fork(job_id, version, changes))


@app.command(sort_key=8)
def rollback(job_id: JobId, version: int, /) -> int:
    """Have a policy version of a job served, an older one or a newer one."""
    from longshore.console import commands

    return _await(commands.rollback(job_id, version))


@app.command(sort_key=9)
def ledger(job_id: JobId, /, *, json: AsJson = False) -> int:
    """Show where every ticket of a job is, by site: issued = the sum of all states."""
    from longshore.console import tickets

    return _await(tickets.ledger(job_id, json))


@app.command(name="rotate-key", sort_key=10)
def rotate_key(job_id: JobId, /) -> int:
    """Have a job's policy versions signed by a new key from now on; what the old one signed stays valid."""
    from longshore.console import commands

    return _await(commands.rotate_key(job_id))


dead_letters = App(
    name="dead-letters",
    help="Tickets that came to nothing and rollouts that were refused, and why.",
    sort_key=10,
    result_action="return_value",
)
app.command(dead_letters)


@dead_letters.command(name="list", sort_key=1)
def list_letters(job_id: JobId, /, *, json: AsJson = False) -> int:
    """List a job's dead letters, oldest first."""
    from longshore.console import tickets

    return _await(tickets.list_letters(job_id, json))


@dead_letters.command(sort_key=2)
def show(job_id: JobId, letter_id: LetterId, /, *, json: AsJson = False) -> int:
    """Show one dead letter: what it was, and why it was set aside."""
    from longshore.console import tickets

    return _await(tickets.show_letter(job_id, letter_id, json))


@dead_letters.command(sort_key=3)
def requeue(job_id: JobId, /, *letter_ids: LetterId) -> int:
    """Have the tasks of dead letters attempted again, as new groups; the old tickets keep their reasons."""
    from longshore.console import tickets

    return _await(tickets.requeue(job_id, letter_ids))


keys = App(
    name="keys", help="API keys: who may use the REST API, and for what.", sort_key=11, result_action="return_value"
)
app.command(keys)
KeyId = Annotated[str, Parameter(help="The id that `keys list` prints.")]


@keys.command(name="list", sort_key=1)
def list_keys(*, json: AsJson = False) -> int:
    """List the keys that can be used, without their secrets."""
    from longshore.console import keys

    return _await(keys.list_keys(json))


@keys.command(name="create", sort_key=2)
def create_key(
    role: Literal["viewer", "submitter", "admin"],
    /,
    *,
    project: Annotated[str | None, Parameter(help="The only project that it is for; every one by default.")] = None,
    name: Annotated[str, Parameter(help="What it is for, for people.")] = "",
    days: Annotated[float, Parameter(help="Days until it expires.", validator=Number(gt=0, lte=3650))] = 90.0,
) -> int:
    """Make an API key and print it: it is shown this once and kept nowhere."""
    from longshore.console import keys

    return _await(keys.create(role, project, name, days))


@keys.command(name="rotate", sort_key=3)
def rotate_api_key(
    key_id: KeyId,
    /,
    *,
    grace: Annotated[
        float, Parameter(help="Seconds for which the old key is still taken.", validator=Number(gte=0))
    ] = 0.0,
) -> int:
    """Make a key in the place of another and print it."""
    from longshore.console import keys

    return _await(keys.rotate(key_id, grace))


@keys.command(name="revoke", sort_key=4)
def revoke_key(key_id: KeyId, /) -> int:
    """End a key at once."""
    from longshore.console import keys

    return _await(keys.revoke(key_id))


SiteName = Annotated[str, Parameter(help="The site's name, as `sites` prints it.")]
site = App(
    name="site",
    help="Rollout sites on other machines and clusters: who may take part, and until when.",
    sort_key=11,
    result_action="return_value",
)
app.command(site)


@site.command(name="join", sort_key=1)
def join_site(
    name: SiteName,
    /,
    *,
    project: Annotated[
        str | None, Parameter(help="The only project whose jobs it takes part in; every one's by default.")
    ] = None,
    days: Annotated[float, Parameter(help="Days until it expires.", validator=Number(gt=0, lte=366))] = 30.0,
    out: Annotated[Path | None, Parameter(help="File to write; NAME.site by default.")] = None,
) -> int:
    """Let a rollout site in, and write the one file that its relay needs."""
    from longshore.console import sites

    return _await(sites.join(name, project, days, out or Path(f"{name}.site")))


@site.command(name="renew", sort_key=2)
def renew_site(file: Annotated[Path, Parameter(help="The file that `site join` wrote.")], /) -> int:
    """Get another certificate for the site of a file, with the file's own key, and write it into the file."""
    from longshore.console import sites

    return _await(sites.renew(file))


@site.command(name="revoke", sort_key=3)
def revoke_site(name: SiteName, /) -> int:
    """Put a rollout site out at once."""
    from longshore.console import sites

    return _await(sites.revoke(name))


@site.command(name="certificate", sort_key=4)
def home_certificate(
    *names: Annotated[str, Parameter(help="Host name or address by which sites reach home's servers.")],
    authority: Annotated[Path, Parameter(help="Folder of the authority; it is made there if there is none.")],
    out: Annotated[Path, Parameter(help="Folder for tls.crt, tls.key and ca.crt.")],
    days: Annotated[float, Parameter(help="Days until it expires.", validator=Number(gt=0, lte=3650))] = 365.0,
) -> int:
    """Make a certificate for home's own servers, signed by the sites' authority; needs no stack."""
    from longshore.console import sites

    if not names:
        sys.stderr.write("longshore site certificate: name at least one host name or address that home is reached by\n")
        return 2
    return sites.home_certificate(names, authority, out, days)


@app.command(name="sites", sort_key=11)
def sites_command(*, json: AsJson = False) -> int:
    """List the rollout sites that have joined, and how their credentials are."""
    from longshore.console import sites

    return _await(sites.list_sites(json))


@app.command(sort_key=11)
def validate(job_file: JobFile, /) -> int:
    """Say everything that is wrong with a job file, without running it."""
    from longshore.console import local

    local.load_checked(job_file, None)
    sys.stdout.write(f"{job_file} is a valid job\n")
    return 0


@app.command(sort_key=12)
def serve(service: Served, /, *, home: Home = "") -> int:
    """Run one service process; its settings are environment variables (see docs/architecture.md)."""
    from longshore.errors import ConfigError

    if home and service != "relay":
        sys.stderr.write(f"longshore serve: --home {home}: only a relay has a home; leave it out for a {service}\n")
        return 2
    if home:
        os.environ["LONGSHORE_HOME_WEIGHTS"] = home
    try:
        module = importlib.import_module(f"longshore.{service}.service")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("longshore"):
            raise
        sys.stderr.write(f"longshore: {service} needs {error.name}: pip install 'longshore[{service}]'\n")
        return 2
    try:
        code: int = module.main()
    except ConfigError as error:
        sys.stderr.write(f"longshore {service}: {error}\n")
        return 2
    return _end(code)


@app.command(sort_key=13)
def wait(service: Waiting, /) -> int:
    """Wait for jobs: run the processes of one service that a gateway gives out (see docs/deploy.md)."""
    from longshore.errors import ConfigError
    from longshore.launcher import waiting

    try:
        code = waiting.main(service)
    except ConfigError as error:
        sys.stderr.write(f"longshore wait {service}: {error}\n")
        return 2
    return _end(code)


def _end(code: int) -> NoReturn:
    """Ends this process without taking the interpreter apart. It has drained, and has nothing left to do; with torch
    that takes a second of a free core, on a busy one ten, in which the launcher would find it silent and kill it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _screen() -> Screen:
    from longshore.console.screen import make_screen

    return make_screen(sys.stdout)


def _await(work: Coroutine[Any, Any, int]) -> int:
    import asyncio

    return asyncio.run(work)
