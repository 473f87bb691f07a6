#!/opt/longshore/bin/python -IS
"""Whether this container's process serves: asks it for /healthz where it has its /metrics. Exit code 0: it does.

Starts in hundredths of a second, since it is started all the time: the standard library alone, and of that little.
"""

import os
import socket
import sys

TIMEOUT_S = 10.0


def status(listen: str) -> str:
    """The answer's first line. Raises OSError, ValueError."""
    host, _, port = listen.rpartition(":")
    anywhere = host in ("", "0.0.0.0", "[::]")  # noqa: S104 - it is asked, not bound
    address = ("127.0.0.1" if anywhere else host.strip("[]"), int(port))
    with socket.create_connection(address, TIMEOUT_S) as link:
        link.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        answer = b""
        while b"\r\n" not in answer:
            part = link.recv(1024)
            if not part:
                break
            answer += part
    return answer.partition(b"\r\n")[0].decode("latin-1")


def main() -> int:
    """0 or 1, with a line on stderr."""
    listen = os.environ.get("LONGSHORE_METRICS_LISTEN", "")
    try:
        line = status(listen)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"LONGSHORE_METRICS_LISTEN {listen}: {error}\n")
        return 1
    if line.split(" ")[1:2] == ["200"]:
        return 0
    sys.stderr.write(f"LONGSHORE_METRICS_LISTEN {listen}: {line}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
