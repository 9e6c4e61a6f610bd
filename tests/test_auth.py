"""Who is asking: tokens, and tokens that were taken back."""

from __future__ import annotations

import collections.abc as cabc
import hashlib
import threading
import time
from pathlib import Path

import pytest
from flask import Flask
from itsdangerous import TimestampSigner
from itsdangerous import URLSafeTimedSerializer

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.auth import Revoked
from agentao_web.auth import Tokens
from agentao_web.auth import by_token
from agentao_web.extension import pool_of
from agentao_web.testing import say
from agentao_web.testing import scripted
from tests.patience import PATIENCE

KEY = "the-auth-tests-own-key"
ANN, BOB, OTHER = Principal("acme", "ann"), Principal("acme", "bob"), Principal("other", "ann")


class Clock:
    """Time by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def issued(principal: Principal, ago: float) -> str:
    """A token of ours that was signed *ago* seconds ago."""

    class Earlier(TimestampSigner):
        def get_timestamp(self) -> int:
            return int(time.time() - ago)

    serializer = URLSafeTimedSerializer(
        [KEY],
        salt="agentao-web.token",
        signer=Earlier,
        signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
    )
    end = int(time.time()) + 3600
    return str(serializer.dumps([principal.tenant, principal.user, end]))


# -- tokens ------------------------------------------------------------------------------------


def test_a_token_says_whom_it_names_and_when_it_was_issued() -> None:
    before = int(time.time())
    token = Tokens([KEY]).issue(ANN, ttl=60)
    found = Tokens([KEY]).open(token)
    assert found is not None and found[0] == ANN
    assert before <= found[1] <= time.time()
    earlier = Tokens([KEY]).open(issued(ANN, 100))
    assert earlier is not None and 98 < time.time() - earlier[1] < 120


def test_a_token_is_good_until_its_end_and_not_at_it() -> None:
    clock = Clock()
    tokens = Tokens([KEY], clock)
    token = tokens.issue(ANN, ttl=60)
    clock.now += 59
    assert tokens.read(token) == ANN
    clock.now += 1
    assert tokens.read(token) is None


def test_only_our_own_untouched_tokens_are_read() -> None:
    token = Tokens([KEY]).issue(ANN, ttl=60)
    assert Tokens(["another-key-altogether"]).read(token) is None
    for wrong in ("", "dev", token[:-1], token[1:], token + "x", "a.b.c", "\ud800", "ä"):
        assert Tokens([KEY]).read(wrong) is None


def test_an_older_key_is_accepted_and_the_newest_one_signs() -> None:
    old, new = Tokens([KEY]), Tokens(["a-newer-key-than-that", KEY])
    assert new.read(old.issue(ANN, ttl=60)) == ANN
    assert old.read(new.issue(ANN, ttl=60)) is None


def test_no_keys_is_a_setup_mistake() -> None:
    with pytest.raises(RuntimeError, match="AGENTAO_SECRET_KEYS"):
        Tokens([])


# -- tokens that were taken back ---------------------------------------------------------------


class Source:
    """What was revoked, and how often it was asked for."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str | None, float]] = []
        self.asked = 0

    def __call__(self) -> list[tuple[str, str | None, float]]:
        self.asked += 1
        return list(self.rows)


def test_a_users_older_tokens_are_void_and_nobody_elses() -> None:
    source, clock = Source(), Clock()
    source.rows = [("acme", "ann", 50.0)]
    revoked = Revoked(source, clock=clock)
    assert revoked(ANN, 49.0)
    assert not revoked(ANN, 50.0), "issued at that moment or later"
    assert not any(revoked(who, 1.0) for who in (BOB, OTHER, Principal("acme")))


def test_a_tenants_older_tokens_are_void_whoever_the_user() -> None:
    source = Source()
    source.rows = [("acme", None, 50.0), ("acme", "ann", 70.0)]
    revoked = Revoked(source, clock=Clock())
    assert revoked(BOB, 49.0) and revoked(Principal("acme"), 49.0)
    assert revoked(ANN, 60.0), "the later of the two counts"
    assert not revoked(BOB, 60.0) and not revoked(OTHER, 1.0)


def test_tokens_without_a_user_are_revoked_apart_from_all_of_a_tenant() -> None:
    source = Source()
    source.rows = [("acme", "", 50.0)]
    revoked = Revoked(source, clock=Clock())
    assert revoked(Principal("acme"), 49.0)
    assert not revoked(ANN, 49.0)


def test_the_source_is_asked_at_most_once_in_its_time() -> None:
    source, clock = Source(), Clock()
    revoked = Revoked(source, ttl=2.0, clock=clock)
    assert not revoked(ANN, 1.0)
    source.rows = [("acme", "ann", 50.0)]
    clock.now += 1.9
    assert not revoked(ANN, 1.0)
    assert source.asked == 1
    clock.now += 0.1
    assert revoked(ANN, 1.0)
    assert source.asked == 2


def test_a_source_that_fails_lets_nobody_in_unseen() -> None:
    """What is known is not used for longer than its time: the store has to answer."""
    answers: list[list[tuple[str, str | None, float]]] = [[]]
    clock = Clock()

    def ask() -> list[tuple[str, str | None, float]]:
        return answers.pop()

    revoked = Revoked(ask, clock=clock)
    assert not revoked(ANN, 1.0)
    clock.now += 5
    with pytest.raises(IndexError):
        revoked(ANN, 1.0)


# -- on a running app --------------------------------------------------------------------------


@pytest.fixture
def app(tmp_path: Path) -> cabc.Iterator[Flask]:
    app = Flask("host")
    app.config.update(AGENTAO_ROOT=tmp_path, AGENTAO_SECRET_KEYS=KEY)
    AgentaoWeb(agents=scripted(say("x"))).init_app(app)
    yield app
    shutdown(app, grace=2)


def status(app: Flask, token: str) -> int:
    headers = {"Authorization": f"Bearer {token}"}
    return app.test_client().get("/sessions", headers=headers).status_code


@pytest.mark.parametrize("user", ["ann", None])
def test_revoked_tokens_are_401_on_a_running_app_within_seconds(
    app: Flask, user: str | None
) -> None:
    olds = {who: issued(who, 100) for who in (ANN, BOB, OTHER)}
    assert [status(app, token) for token in olds.values()] == [200, 200, 200]
    pool_of(app).store.revoke("acme", user, time.time() - 50)
    begun = time.monotonic()
    while status(app, olds[ANN]) == 200:
        assert time.monotonic() - begun < PATIENCE, "it is still good"
        threading.Event().wait(0.05)  # Between two looks: the app remembers for 2 seconds.
    assert status(app, olds[ANN]) == 401
    assert status(app, olds[BOB]) == (200 if user else 401)
    assert status(app, olds[OTHER]) == 200
    assert [status(app, issued(who, 0)) for who in (ANN, BOB, OTHER)] == [200, 200, 200]


def test_a_revoked_token_is_a_401_like_any_other(tmp_path: Path) -> None:
    clock, source = Clock(), Source()
    who = by_token(Tokens([KEY]), demo=False, revoked=Revoked(source, clock=clock))
    app = Flask("host")
    app.config.update(AGENTAO_ROOT=tmp_path)
    AgentaoWeb(authenticate=who, agents=scripted(say("x"))).init_app(app)
    token = issued(ANN, 100)
    assert status(app, token) == 200
    source.rows = [("acme", "ann", time.time() - 50)]
    clock.now += 2
    headers = {"Authorization": f"Bearer {token}"}
    answer = app.test_client().get("/sessions", headers=headers)
    assert (answer.status_code, answer.json and answer.json["code"]) == (401, "unauthorized")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert status(app, issued(ANN, 0)) == 200
    shutdown(app)


def test_the_demos_token_cannot_be_revoked_and_is_none_elsewhere(tmp_path: Path) -> None:
    source = Source()
    source.rows = [("demo-tenant", None, time.time() + 999)]
    codes = []
    for demo in (True, False):
        who = by_token(Tokens([KEY]), demo=demo, revoked=Revoked(source))
        app = Flask("host")
        app.config.update(AGENTAO_ROOT=tmp_path / str(demo))
        AgentaoWeb(authenticate=who, agents=scripted(say("x"))).init_app(app)
        codes.append(status(app, "dev"))
        shutdown(app)
    assert codes == [200, 401]
