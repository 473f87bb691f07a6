"""The keys whose signatures a reader believes: the one that its site was given, and those that succeeded it."""

from __future__ import annotations

from collections.abc import Sequence

from longshore import signing
from longshore.errors import IntegrityError
from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store.keychain import verify_chain


class KeyRing:
    """Public keys of one job by their short names."""

    def __init__(self, job: JobRef, trusted: bytes) -> None:
        """
        Args:
            trusted: any key of the job that came by a way which is trusted.
        """
        self._job = job
        self._trusted = trusted
        self._keys = {signing.key_id(trusted): trusted}

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._keys

    def key(self, key_id: str) -> bytes:
        """Raises IntegrityError for a key that is not known to be the job's."""
        if key_id not in self._keys:
            raise IntegrityError(f"key {key_id} is not known to be one of {self._job}'s")
        return self._keys[key_id]

    def extend(self, first: bytes, rotations: Sequence[weights_pb2.SignedKeyRotation]) -> None:
        """Takes in a job's keys as a store tells them: those that succeeded the trusted one are believed.

        Raises:
            IntegrityError: the chain is broken, or does not hold the trusted key.
            Rejected: a rotation makes no sense.
        """
        chain = verify_chain(self._job, first, rotations)
        if self._trusted not in chain:
            raise IntegrityError(f"the keys told of {self._job} do not lead to key {signing.key_id(self._trusted)}")
        # Those before it may be anybody's: their owner could have signed the trusted key over.
        for key in chain[chain.index(self._trusted) :]:
            self._keys[signing.key_id(key)] = key
