"""A small disk of our own (tmpfs), which can be filled and freed. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_PIECE = bytes(1024 * 1024)


def why_not() -> str:
    """Why no small disk can be had on this machine; "" when one can."""
    if os.geteuid() != 0:
        return "mounting a small disk needs root"
    if shutil.which("unshare") is None:
        return "there is no unshare(1)"
    # In a mount namespace that ends with the command, so that nothing is left behind.
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", folder]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    return said.stderr.strip() if said.returncode else ""


class SmallDisk:
    """A folder that becomes a tmpfs by `mount`, if that can be."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        self._megabytes = megabytes
        self._mounted = False

    def mount(self) -> None:
        """Makes the folder, and a disk of it where `why_not` says nothing against it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not why_not():
            command = ["mount", "-t", "tmpfs", "-o", f"size={self._megabytes}m", "longshore-chaos", str(self.folder)]
            subprocess.run(command, check=True)
            self._mounted = True

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"

    def fill(self) -> int:
        """Leaves not a byte free. Returns how many it took."""
        taken = 0
        descriptor = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            for size in (len(_PIECE), 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        taken += os.write(descriptor, _PIECE[:size])
        finally:
            os.close(descriptor)
        return taken

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Takes the disk away, with everything on it."""
        self.free()
        if self._mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=False)
