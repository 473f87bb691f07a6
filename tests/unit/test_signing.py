from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from longshore.errors import ConfigError, Conflict, IntegrityError
from longshore.signing import MANIFEST_DOMAIN, POINTER_DOMAIN, SigningKey, key_id, verify


def test_a_key_file_is_its_owners_alone_and_gives_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "learner.pem"
    key = SigningKey.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SigningKey.load(path).public_key == key.public_key
    assert [item.name for item in tmp_path.iterdir()] == ["learner.pem"]


def test_a_key_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "learner.pem"
    key = SigningKey.create(path)
    with pytest.raises(Conflict):
        SigningKey.create(path)
    assert SigningKey.load(path).public_key == key.public_key
    assert [item.name for item in tmp_path.iterdir()] == ["learner.pem"]


def test_a_key_that_everyone_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "learner.pem"
    SigningKey.create(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod"):
        SigningKey.load(path)


@pytest.mark.parametrize("kind", ["missing", "rubbish", "another algorithm", "folder missing"])
def test_what_is_no_key_is_a_setting_that_cannot_work(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "learner.pem"
    if kind == "rubbish":
        path.touch(0o600)
    elif kind == "another algorithm":
        path.touch(0o600)
        path.write_bytes(
            ec.generate_private_key(ec.SECP256R1()).private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    with pytest.raises(ConfigError):
        SigningKey.create(tmp_path / "no" / "key") if kind == "folder missing" else SigningKey.load(path)


def test_a_signature_holds_for_its_key_domain_and_message_only() -> None:
    key, other = SigningKey.generate(), SigningKey.generate()
    signature = key.sign(MANIFEST_DOMAIN, b"message")
    verify(key.public_key, MANIFEST_DOMAIN, b"message", signature)
    for public_key, domain, message, proof in [
        (other.public_key, MANIFEST_DOMAIN, b"message", signature),
        (key.public_key, POINTER_DOMAIN, b"message", signature),
        (key.public_key, MANIFEST_DOMAIN, b"massage", signature),
        (key.public_key, MANIFEST_DOMAIN, b"message", signature[:-1]),
        (key.public_key, MANIFEST_DOMAIN, b"message", b""),
        (b"short", MANIFEST_DOMAIN, b"message", signature),
    ]:
        with pytest.raises(IntegrityError):
            verify(public_key, domain, message, proof)


def test_the_domains_and_key_id_are_those_of_the_contract() -> None:
    assert (MANIFEST_DOMAIN, POINTER_DOMAIN) == (b"longshore.manifest.v1\0", b"longshore.pointer.v1\0")
    key = SigningKey.generate()
    assert key.key_id == key_id(key.public_key) == hashlib.sha256(key.public_key).hexdigest()[:16]


def test_a_key_does_not_show_itself() -> None:
    assert repr(key := SigningKey.generate()) == f"SigningKey({key.key_id})"
