"""What a rollout site may do at the home broker, as the rules of an ACL user: to lease tickets and to hand in rollouts.

Functions run with their caller's rights, so a site also has those commands that its functions are made of, each on the
one kind of key that it is for. What that leaves open to a site which is hostile is in docs/security.md; a test holds
the rules to what a relay needs.
"""

from __future__ import annotations

from longshore.rollout_queue.broker import VERSION

USER_PREFIX = "longshore-site-"
_FUNCTIONS = ("incarnation", "lease", "attempts", "adopt", "renew_site", "reject", "deliver", "covered")
# By the last words of a key. What is in `rollouts` and `dead` a site adds to, and cannot read.
_COMMANDS = {
    "tickets": ("xreadgroup", "xrange", "xack", "xdel"),
    "leased": ("xreadgroup", "xrange", "xadd", "xclaim", "xautoclaim", "xack", "xdel"),
    "live": ("hmget", "hset", "hdel"),
    "counts": ("hincrby",),
    "rollouts": ("xadd",),
    "dead": ("xadd",),
    "reconciled": ("get",),
    "t:*:journal": ("del",),
}
# On no key. A function asks INFO for the server's run id alone. (Redis 7.0 refuses rules about what came with 7.2.)
_PLAIN = ("ping", "hello", "info|server")


def user_name(site: str) -> str:
    """Example: "longshore-site-west"."""
    return f"{USER_PREFIX}{site}"


def user_rules(project: str | None, password_sha256: str) -> list[str]:
    """Arguments of ACL SETUSER for a site that takes part in a project's jobs (None: in every one's).

    Args:
        password_sha256: 64 hex digits.

    Raises:
        ValueError: the project's name has characters that mean something in a pattern.
    """
    if project is not None and set("*?[]{}\\/ ") & set(project):
        raise ValueError(f"not a project's name: {project!r}")
    # The hash tag ends at the first brace: no job of another project has a key like these.
    home = f"ls:{{{project}/*}}:home:" if project is not None else "ls:{*}:home:"
    calls = " ".join(f"+fcall|longshore_{VERSION}_{function}" for function in _FUNCTIONS)
    selectors = [f"(~{home}tickets {calls})"]
    selectors += [f"(~{home}{key} {_allowed(commands)})" for key, commands in _COMMANDS.items()]
    return ["reset", "on", f"#{password_sha256}", *_allowed(_PLAIN).split(), *selectors]


def _allowed(commands: tuple[str, ...]) -> str:
    return " ".join(f"+{command}" for command in commands)
