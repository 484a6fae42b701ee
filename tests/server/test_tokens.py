"""Tokens: only hashes are kept, rights and sites hold, time and revoking end them."""

import json
import stat
import time

import pytest

from fspace.errors import AccessRefused, OptionError, ServerError
from fspace.server import tokens as module
from fspace.server.tokens import Buckets, Tokens


def refusal(tokens, token):
    with pytest.raises(AccessRefused) as refused:
        tokens.check(token)
    assert refused.value.status == 401
    return refused.value.reason


def test_a_token_is_not_in_the_file_which_only_its_owner_reads(tmp_path):
    path = tmp_path / "tokens.json"
    token = Tokens(path).issue(["put", "read"], "UA")
    assert token.rsplit("-", 1)[1] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    grant = Tokens(path).check(token)
    assert (grant.site, grant.rights) == ("UA", ("put", "read"))


def test_missing_wrong_expired_and_revoked(tmp_path, monkeypatch):
    tokens = Tokens(tmp_path / "tokens.json")
    good, other = tokens.issue(["read"]), tokens.issue(["read"])
    assert refusal(tokens, None) == refusal(tokens, "") == "token"
    assert refusal(tokens, good[:-1]) == refusal(tokens, good + "a") == refusal(tokens, "nö") == "token"
    tokens.revoke(good)
    assert refusal(tokens, good) == "revoked"
    assert tokens.check(other)
    later = time.time() + 31 * 86400
    monkeypatch.setattr(module.time, "time", lambda: later)
    assert refusal(tokens, other) == "expired"


def test_a_running_server_sees_what_another_process_changes(tmp_path):
    running, other = Tokens(tmp_path / "t.json"), Tokens(tmp_path / "t.json")
    token = other.issue(["read"])
    assert running.check(token)
    another = running.issue(["read"])
    other.revoke(token.split("-")[1])
    assert refusal(running, token) == "revoked"
    assert other.check(another)


def test_rights_and_sites():
    tokens = Tokens()
    grant = tokens.check(tokens.issue(["put"], "UA"))
    grant.require("put", "UA")
    for right, site, reason in (("put", "AA", "site"), ("read", None, "right"), ("admin", None, "right")):
        with pytest.raises(AccessRefused) as refused:
            grant.require(right, site)
        assert (refused.value.status, refused.value.reason) == (403, reason)


@pytest.mark.parametrize("rights, site, days", [
    (["put"], None, 1), ([], None, 1), (["write"], "UA", 1), (["read"], None, 0), (["read"], None, float("nan")),
    (["put"], "a\nb", 1), (["put"], "..", 1), (["put"], 201 * "a", 1),
])  # fmt: skip
def test_tokens_that_are_not_made(rights, site, days):
    with pytest.raises(OptionError):
        Tokens().issue(rights, site, days)


def test_damaged_file(tmp_path):
    (tmp_path / "t.json").write_text("[")
    with pytest.raises(ServerError, match="damaged"):
        Tokens(tmp_path / "t.json")
    with pytest.raises(OptionError, match="no token"):
        Tokens().revoke("abc")


@pytest.mark.parametrize(
    "spoilt", [{"expires": "soon"}, {"hash": 7}, {"hash": "é"}, {"site": 3}, {"revoked": "no"}, {"rights": 1}]
)
def test_a_file_edited_by_hand_is_refused_where_it_is_read_and_not_at_every_request(tmp_path, spoilt):
    path = tmp_path / "t.json"
    Tokens(path).issue(["read"])
    (row,) = json.loads(path.read_text())["tokens"]
    path.write_text(json.dumps({"tokens": [row]}))
    assert len(Tokens(path).grants()) == 1
    path.write_text(json.dumps({"tokens": [row | spoilt]}))
    with pytest.raises(ServerError, match="damaged"):
        Tokens(path)


def test_a_bucket_empties_and_fills(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    bucket = Buckets(rate=2.0, burst=3)
    for _ in range(3):
        bucket.take("a")
    with pytest.raises(AccessRefused) as refused:
        bucket.take("a")
    assert refused.value.status == 429 and refused.value.retry_after == 0.5
    bucket.take("b")
    now[0] = 0.5
    bucket.take("a")
