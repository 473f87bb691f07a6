"""A network namespace of our own, with one link to this one that can be cut and joined again. Needs root and ip(8)."""

from __future__ import annotations

import os
import shutil
import subprocess


class Namespace:
    """Two addresses: `outside` is this end of the link, `inside` the other. Nothing else is reachable from inside."""

    def __init__(self, name: str, subnet: int) -> None:
        """`name` has at most 10 characters; `subnet` (1-254) is not to be used by another namespace at a time."""
        self.name = name
        self.outside, self.inside = f"10.97.{subnet}.1", f"10.97.{subnet}.2"
        self._device, self._other = f"{name}-o", f"{name}-i"

    @property
    def prefix(self) -> list[str]:
        """What makes a command run inside; it keeps its process id."""
        return ["ip", "netns", "exec", self.name]

    def open(self) -> None:
        """Makes the namespace and the link."""
        _ip("netns", "add", self.name)
        _ip("link", "add", self._device, "type", "veth", "peer", "name", self._other, "netns", self.name)
        _ip("address", "add", f"{self.outside}/24", "dev", self._device)
        _ip("-n", self.name, "address", "add", f"{self.inside}/24", "dev", self._other)
        _ip("-n", self.name, "link", "set", "lo", "up")
        _ip("-n", self.name, "link", "set", self._other, "up")
        self.join()

    def cut(self) -> None:
        """From now on every packet is lost; whoever is connected hears nothing of it."""
        _ip("link", "set", self._device, "down")

    def join(self) -> None:
        _ip("link", "set", self._device, "up")

    def close(self) -> None:
        """Harmless when repeated, or when `open` failed half-way."""
        for command in (("link", "delete", self._device), ("netns", "delete", self.name)):
            subprocess.run(["ip", *command], capture_output=True, check=False)


def why_not() -> str:
    """Why no namespace can be had on this machine; "" when one can."""
    if os.geteuid() != 0:
        return "making a network namespace needs root"
    if shutil.which("ip") is None:
        return "there is no ip(8)"
    trial = Namespace(f"lst{os.getpid() % 10**7}", 254)
    try:
        trial.open()
    except subprocess.CalledProcessError as error:
        return f"a network namespace cannot be made: {error.stderr.decode().strip()}"
    finally:
        trial.close()
    return ""


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)
