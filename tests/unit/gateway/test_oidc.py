"""OIDC tokens, against a key server on loopback that is a plain HTTP server."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from longshore.errors import Unavailable
from longshore.gateway import oidc
from longshore.gateway.api_keys import ApiKeys
from longshore.gateway.auth import Authenticator
from longshore.gateway.database import Database
from longshore.gateway.oidc import Issuer, Tokens
from longshore.gateway.principal import Principal, Role
from longshore.gateway.problems import Problem

ISSUER = "https://id.example.org/"
CLAIMS = {"sub": "anna", "longshore_role": "submitter", "longshore_project": "vision"}


class KeyServer:
    """Publishes the public halves of keys, by id."""

    def __init__(self) -> None:
        self.keys: dict[str, ec.EllipticCurvePrivateKey] = {}
        self.asked = 0
        # In place of the keys.
        self.answer: bytes | None = None
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.asked += 1
                self.send_response(200)
                self.end_headers()
                self.wfile.write(owner.answer or json.dumps({"keys": owner.public()}).encode())

            def log_message(self, *args: object) -> None:
                """Says nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks"

    def add(self, key_id: str) -> None:
        self.keys[key_id] = ec.generate_private_key(ec.SECP256R1())

    def public(self) -> list[dict[str, str]]:
        shown = []
        for key_id, key in self.keys.items():
            shown.append({**ECAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": key_id, "use": "sig"})
        return shown

    def token(self, key_id: str = "k1", **claims: object) -> str:
        body = {"iss": ISSUER, "aud": "longshore", "exp": time.time() + 600, **CLAIMS, **claims}
        present = {name: value for name, value in body.items() if value is not None}
        return jwt.encode(present, self.keys[key_id], "ES256", {"kid": key_id})


@pytest.fixture
def server() -> Iterator[KeyServer]:
    made = KeyServer()
    made.add("k1")
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture
def tokens(server: KeyServer) -> Tokens:
    return Tokens(Issuer(ISSUER, "longshore", server.url))


async def test_a_sound_token_says_who_may_do_what(server: KeyServer, tokens: Tokens) -> None:
    assert await tokens.find(server.token()) == Principal("oidc:anna", "vision", Role.SUBMITTER)
    everything = server.token(longshore_project="*", longshore_role="admin")
    assert await tokens.find(everything) == Principal("oidc:anna", None, Role.ADMIN)
    assert server.asked == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"exp": time.time() - 3600},
        {"exp": None},
        {"nbf": time.time() + 3600},
        {"aud": "another"},
        {"aud": None},
        {"iss": "https://id.example.com/"},
        {"iss": None},
        {"sub": None},
        {"longshore_role": None},
        {"longshore_role": "owner"},
        {"longshore_role": ["admin"]},
        {"longshore_project": None},
        {"longshore_project": ""},
        {"longshore_project": "../x"},
        {"longshore_project": ["*"]},
    ],
)
async def test_other_tokens_are_nobodys(server: KeyServer, tokens: Tokens, wrong: dict[str, object]) -> None:
    assert await tokens.find(server.token(**wrong)) is None


async def test_signatures_that_are_none(server: KeyServer, tokens: Tokens) -> None:
    claims = {"iss": ISSUER, "aud": "longshore", "exp": time.time() + 600, **CLAIMS}
    # What everybody knows taken for a shared secret.
    public = server.public()[0]["x"]
    confused = jwt.PyJWS().encode(json.dumps(claims).encode(), public, "HS256", {"kid": "k1"})
    head, body, signature = server.token().split(".")
    other = server.token(sub="eve").split(".")[1]
    for text in (
        jwt.encode(claims, "", "none", {"kid": "k1"}),
        jwt.encode(claims, ec.generate_private_key(ec.SECP256R1()), "ES256", {"kid": "k1"}),
        jwt.encode(claims, server.keys["k1"], "ES256"),
        confused,
        f"{head}.{other}.{signature}",
        f"{head}.{body}.",
        "a.b.c",
        "..",
        "ls_0123456789ab_x",
        "x." * 2 + "y" * oidc.MAX_TOKEN_CHARACTERS,
    ):
        assert await tokens.find(text) is None


async def test_new_keys_are_asked_for_but_not_too_often(
    server: KeyServer, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await tokens.find(server.token()) is not None
    server.add("k2")
    assert await tokens.find(server.token("k2")) is None
    assert server.asked == 1
    monkeypatch.setattr(oidc, "_REFRESH_S", 0.0)
    assert await tokens.find(server.token("k2")) is not None
    del server.keys["k1"]
    monkeypatch.setattr(oidc, "_KEYS_S", 0.0)
    assert await tokens.find(server.token("k2")) is not None
    assert server.asked == 3


async def test_keys_that_cannot_be_had(server: KeyServer) -> None:
    away = Tokens(Issuer(ISSUER, "longshore", "http://127.0.0.1:1/jwks"))
    with pytest.raises(Unavailable):
        await away.find(server.token())


@pytest.mark.parametrize("answer", [b"<html>", b"\xff", b"[]", b'{"keys": 7}', b'{"keys": [{"kty": "EC"}]}'])
async def test_an_issuer_that_answers_with_something_else(server: KeyServer, tokens: Tokens, answer: bytes) -> None:
    server.answer = answer
    with pytest.raises(Unavailable):
        await tokens.find(server.token())


async def test_the_authenticator_takes_keys_and_tokens(server: KeyServer, tokens: Tokens, tmp_path: Path) -> None:
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'keys.db'}")
    await database.open()
    authenticate = Authenticator(ApiKeys(database), "root-key", tokens=tokens)
    assert (await authenticate(server.token(), "127.0.0.1")).id == "oidc:anna"
    assert (await authenticate("root-key", "127.0.0.1")).id == "root"
    with pytest.raises(Problem, match="401"):
        await authenticate(server.token(exp=1.0), "127.0.0.1")
    await database.close()
