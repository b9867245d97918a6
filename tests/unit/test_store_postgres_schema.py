"""What the PostgreSQL journal can be asked without a server: texts that rest exactly, ranges of a prefix, addresses, advice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import example, given
from hypothesis import strategies as st

from agl_ray.store.journals import postgres_setup, postgres_trouble
from agl_ray.store.journals.postgres import PostgresJournal
from agl_ray.store.journals.postgres_owner import lock_key
from agl_ray.store.journals.postgres_schema import HEAD, hide, show
from agl_ray.store.journals.postgres_setup import connect_arguments
from agl_ray.store.journals.postgres_trouble import Server, parsed
from agl_ray.types import ConfigError, InputError, StoreError

# Few characters, so that the hidden ones meet in every order.
TEXTS = st.text(st.sampled_from("\0\x01\x02\x03\x04\x05\x06ab"), max_size=6) | st.text(max_size=6)


@given(TEXTS, TEXTS)
@example("\0", "\x01\x03")
@example("\x04", "\x01")
def test_hidden_texts_keep_order_parts_and_themselves(one: str, other: str) -> None:
    assert show(hide(one)) == one
    assert "\0" not in hide(one)
    assert (hide(one) < hide(other)) == (one < other)
    assert (hide(one) in hide(other)) == (one in other)


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(InputError, match="UTF-8"):
        hide("a\ud800")


@pytest.mark.parametrize(
    "url", ["postgresql://u:secret@host:port/db", "postgresql://u:secret@host", "postgresql"]
)
def test_an_address_that_cannot_be_read(url: str) -> None:
    with pytest.raises(ConfigError, match=r"store\.url: expected") as caught:
        PostgresJournal(url, "run")
    assert "secret" not in str(caught.value)


def test_what_the_url_says_goes_first() -> None:
    url = parsed("postgresql://u@h/d?connect_timeout=3&options=-c%20search_path%3Dmine")
    found = connect_arguments(url, "run")
    assert "connect_timeout" not in found
    assert found["options"].endswith("-c search_path=mine")
    assert "idle_in_transaction_session_timeout" in found["options"]
    assert found["application_name"] == "agl-ray store run"
    assert connect_arguments(url, "a\0b")["application_name"] == "agl-ray store a?b"


def test_locks_of_runs_differ_and_stay() -> None:
    assert lock_key("a") == lock_key("a")
    assert lock_key("a") != lock_key("b")
    assert -(2**63) <= lock_key("\ud800") < 2**63


def test_the_newest_migration_is_the_head() -> None:
    names = [path.name for path in (postgres_setup.MIGRATIONS / "versions").glob("v*.py")]
    assert max(names).startswith(f"v{HEAD}_")
    assert Path(postgres_setup.MIGRATIONS / "env.py").exists()


def server(seconds: float = 5.0) -> Server:
    return Server(sa.make_url("postgresql+psycopg://me:secret@db:1/d"), "run", seconds)


class Failing:
    """Fails `times` times, then gives 7."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.left, self.calls = error, times, 0

    async def __call__(self) -> int:
        self.calls += 1
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return 7


def away(text: str = "connection refused") -> Exception:
    return sa.exc.OperationalError("INSERT", {}, psycopg.OperationalError(text))


def test_a_server_that_comes_back_costs_only_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_trouble, "PAUSE_SECONDS", 0.001)
    work = Failing(away(), 3)
    assert asyncio.run(server().persist("write", work)) == 7
    assert work.calls == 4


def test_a_server_that_stays_away_is_named_with_what_to_do() -> None:
    work = Failing(away("Connection refused"), 100)
    with pytest.raises(StoreError) as caught:
        asyncio.run(server(0.2).persist("write", work))
    text = str(caught.value)
    assert (
        "db:1, database 'd', run 'run': cannot write: Connection refused (start the server" in text
    )
    assert "secret" not in text
    assert work.calls > 1


@pytest.mark.parametrize(
    "error",
    [
        away('FATAL:  password authentication failed for user "me"'),
        away('FATAL:  database "d" does not exist'),
        sa.exc.ProgrammingError("x", {}, psycopg.errors.InsufficientPrivilege("permission denied")),
        sa.exc.DataError("x", {}, psycopg.errors.NumericValueOutOfRange("bigint out of range")),
    ],
)
def test_what_time_does_not_mend_is_not_tried_again(error: Exception) -> None:
    work = Failing(error, 100)
    with pytest.raises(StoreError, match=r"cannot write: .*\(.*\)"):
        asyncio.run(server().persist("write", work))
    assert work.calls == 1


def test_a_server_that_never_answers_is_given_up() -> None:
    with pytest.raises(StoreError, match=r"no answer within 0\.1 s to write"):
        asyncio.run(server(0.1).persist("write", lambda: asyncio.sleep(60)))


def test_a_bug_is_not_taken_for_trouble() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(server().persist("write", Failing(ZeroDivisionError(), 1)))
