"""A publish whose header was found good; its payload is still to come."""

from __future__ import annotations

from dataclasses import dataclass

from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.version import PointerState


@dataclass(frozen=True)
class Admission:
    """What `WeightStore.admit` found, for `WeightStore.commit`."""

    job: JobRef
    key: VersionKey
    manifest: weights_pb2.Manifest
    # Without the assets: this becomes the version's `manifest` object.
    record: weights_pb2.PublishHeader
    assets: bytes
    head: PointerState | None

    @property
    def encoding(self) -> weights_pb2.Encoding:
        return self.record.encoding

    @property
    def base(self) -> VersionKey | None:
        """What a delta or adapter is decoded against; None for a full encoding."""
        if not self.encoding.HasField("base_version"):
            return None
        return VersionKey(self.key.weight_set, self.encoding.base_version)
