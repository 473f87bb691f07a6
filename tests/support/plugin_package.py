"""Installs plug-ins for a test: a folder with modules and the metadata that names their entry points."""

from __future__ import annotations

from pathlib import Path


def write_package(folder: Path, name: str, modules: dict[str, str], entry_points: dict[str, dict[str, str]]) -> Path:
    """Writes what `pip install --target` would; put the folder on a process's PYTHONPATH.

    Args:
        modules: file name -> source.
        entry_points: group -> name -> "module:Class".
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file, source in modules.items():
        (folder / file).write_text(source, encoding="utf-8")
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    sections = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in entry_points.items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(sections), encoding="utf-8")
    return folder
