"""Where a store is, and that its password is never written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from agl_ray.config.store_address import masked, store_url, without_keys
from agl_ray.types import ConfigError

FOLDER = Path("/runs/one")
URL = "postgresql://me:s3cr:et@db.example:5432/agl"


def test_the_configuration_wins_over_the_environment_and_that_over_the_run_folder() -> None:
    assert store_url("sqlite:///a.db", FOLDER, {"DATABASE_URL": URL}) == "sqlite:///a.db"
    assert store_url(None, FOLDER, {"DATABASE_URL": URL}) == URL
    assert store_url(None, FOLDER, {"DATABASE_URL": ""}) == "sqlite:////runs/one/store.db"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "postgresql://me:***@db.example:5432/agl"),
        ("mongodb://u:p@a:1,b:2/x?replicaSet=rs0", "mongodb://u:***@a:1,b:2/x?replicaSet=rs0"),
        ("postgresql://me@db/agl", "postgresql://me@db/agl"),
        ("sqlite:////runs/one/store.db", "sqlite:////runs/one/store.db"),
        ("memory://", "memory://"),
    ],
)
def test_passwords_are_masked(url: str, shown: str) -> None:
    assert masked(url) == shown
    assert masked(shown) == shown


def test_a_masked_url_gets_its_password_from_the_environment() -> None:
    assert store_url(masked(URL), FOLDER, {"DATABASE_URL": URL}) == URL


@pytest.mark.parametrize("variable", ["", "postgresql://me:x@other:5432/agl"])
def test_a_masked_url_without_its_password_says_what_to_set(variable: str) -> None:
    with pytest.raises(
        ConfigError, match=r"store.url: .*:\*\*\*@db.example.* set DATABASE_URL"
    ) as e:
        store_url(masked(URL), FOLDER, {"DATABASE_URL": variable})
    assert "s3cr" not in str(e.value)


def test_a_secret_in_the_address_of_files_is_refused_without_being_shown() -> None:
    for good in ("journal", "file:///runs", "s3://bucket/runs?region=eu", "gs://anonymous@bucket"):
        assert without_keys(good) == good
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as caught:
        without_keys("s3://me:hidden@bucket/runs")
    assert "hidden" not in str(caught.value)
