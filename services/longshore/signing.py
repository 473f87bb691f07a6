"""Ed25519 signatures: what a learner publishes can be checked by anyone who knows its public key.

Every signature is over a domain prefix and the message, so that one kind of message can never pass for another.
Knows nothing of what is signed, nor of protobuf.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from longshore.errors import ConfigError, Conflict, IntegrityError

MANIFEST_DOMAIN = b"longshore.manifest.v1\0"
POINTER_DOMAIN = b"longshore.pointer.v1\0"
ROTATION_DOMAIN = b"longshore.rotation.v1\0"

PUBLIC_KEY_BYTES = 32


class SigningKey:
    """A private key. Its file is PEM (PKCS #8, unencrypted), readable by its owner alone."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_key: bytes = private.public_key().public_bytes_raw()
        self.key_id = key_id(self.public_key)

    def __repr__(self) -> str:
        return f"SigningKey({self.key_id})"

    @staticmethod
    def generate() -> SigningKey:
        """A new key that is nowhere on disk."""
        return SigningKey(Ed25519PrivateKey.generate())

    @staticmethod
    def create(path: Path) -> SigningKey:
        """Makes a new key and its file, mode 0600: after a crash the file is whole or not there.

        Raises:
            Conflict: the file exists.
            ConfigError: the file cannot be written.
        """
        key = SigningKey.generate()
        pem = key._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        # The name is random, because a crash may have left the file of an earlier attempt.
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(pem)
                    file.flush()
                    os.fsync(file.fileno())
                # A link fails where the name is taken; a rename would replace another's key.
                os.link(draft, path)
            finally:
                draft.unlink()
        except FileExistsError:
            raise Conflict(f"the signing key {path} exists") from None
        except OSError as error:
            raise ConfigError(f"signing key {path}: {error.strerror}") from None
        return key

    @staticmethod
    def load(path: Path) -> SigningKey:
        """Reads a key file. Raises ConfigError: missing, not an Ed25519 key, or open to everyone on the machine."""
        try:
            if stat.S_IMODE(path.stat().st_mode) & 0o007:
                raise ConfigError(f"signing key {path} is open to every user: chmod 600 it")
            pem = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"signing key {path}: {error.strerror}") from None
        try:
            private = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigError(f"signing key {path} is not an unencrypted PEM private key") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise ConfigError(f"signing key {path} is not an Ed25519 key")
        return SigningKey(private)

    def sign(self, domain: bytes, message: bytes) -> bytes:
        """The 64-byte signature over domain + message. The same input gives the same signature."""
        return self._private.sign(domain + message)


def key_id(public_key: bytes) -> str:
    """A public key's short name: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def verify(public_key: bytes, domain: bytes, message: bytes, signature: bytes) -> None:
    """Returns if the key signed domain + message. Raises IntegrityError otherwise."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, domain + message)
    except ValueError:
        raise IntegrityError("not an Ed25519 public key") from None
    except InvalidSignature:
        raise IntegrityError(f"the signature is not that of key {key_id(public_key)}") from None
