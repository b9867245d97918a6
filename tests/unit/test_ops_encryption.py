"""Encrypted values: they come back only whole, only where they belong, only with their key; keys can be changed."""

from __future__ import annotations

import base64

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st

from agl_ray.ops.encryption import Algorithm, FieldCipher
from agl_ray.types import ConfigError, StoreError

OLD, NEW = FieldCipher.new_key(), FieldCipher.new_key()
ALGORITHMS: list[Algorithm] = ["aes-gcm", "fernet"]
both = pytest.mark.parametrize("algorithm", ALGORITHMS)
CIPHERS = {name: FieldCipher(name, [NEW]) for name in ALGORITHMS}


@given(st.sampled_from(ALGORITHMS), st.binary(), st.lists(st.text()))
def test_what_goes_in_comes_out(algorithm: Algorithm, value: bytes, names: list[str]) -> None:
    cipher = CIPHERS[algorithm]
    sealed = cipher.encrypt(value, *names)
    assert cipher.decrypt(sealed, *names) == value
    assert len(value) < 4 or value not in sealed
    assert len(sealed) - len(value) <= {"aes-gcm": 38, "fernet": 115}[algorithm]
    assert sealed != cipher.encrypt(value, *names), "every value has its own nonce"


@given(st.sampled_from(ALGORITHMS), st.data())
def test_a_changed_byte_is_noticed_anywhere(algorithm: Algorithm, data: st.DataObject) -> None:
    sealed = bytearray(CIPHERS[algorithm].encrypt(b"forty-two", "rollout", "ro-1"))
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(StoreError):
        CIPHERS[algorithm].decrypt(bytes(sealed), "rollout", "ro-1")


@given(st.sampled_from(ALGORITHMS), st.data())
def test_a_cut_value_is_noticed(algorithm: Algorithm, data: st.DataObject) -> None:
    sealed = CIPHERS[algorithm].encrypt(b"forty-two", "ro-1")
    with pytest.raises(StoreError):
        CIPHERS[algorithm].decrypt(sealed[: data.draw(st.integers(0, len(sealed) - 1))], "ro-1")


@given(st.sampled_from(ALGORITHMS), st.lists(st.text()), st.lists(st.text()))
def test_a_value_decrypts_only_where_it_belongs(
    algorithm: Algorithm, here: list[str], there: list[str]
) -> None:
    if here == there:
        return
    sealed = CIPHERS[algorithm].encrypt(b"secret", *here)
    with pytest.raises(StoreError, match="moved here from another record"):
        CIPHERS[algorithm].decrypt(sealed, *there)


@both
def test_rotation(algorithm: Algorithm) -> None:
    before, after = FieldCipher(algorithm, [OLD]), FieldCipher(algorithm, [NEW, OLD])
    sealed = before.encrypt(b"secret", "ro-1")
    assert after.decrypt(sealed, "ro-1") == b"secret"
    assert not before.needs_rotation(sealed)
    assert after.needs_rotation(sealed)
    fresh = after.rotate(sealed, "ro-1")
    assert not after.needs_rotation(fresh)
    assert after.rotate(fresh, "ro-1") is fresh
    assert FieldCipher(algorithm, [NEW]).decrypt(fresh, "ro-1") == b"secret"
    with pytest.raises(StoreError, match=f"encrypted with the key {after.key_ids[0]}.*has only"):
        before.decrypt(fresh, "ro-1")


@both
def test_plain_text_is_not_taken_for_encrypted(algorithm: Algorithm) -> None:
    for plain in (b"", b"{}", b'{"rollout_id": "ro-1"}'):
        with pytest.raises(
            StoreError, match=f"rollout/ro-1: expected a value encrypted with {algorithm}"
        ):
            CIPHERS[algorithm].decrypt(plain, "rollout", "ro-1")


def test_the_other_algorithm_is_named() -> None:
    sealed = CIPHERS["fernet"].encrypt(b"secret")
    with pytest.raises(StoreError, match="got one of fernet"):
        CIPHERS["aes-gcm"].decrypt(sealed)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("not base64 at all!", "not base64"),
        (base64.b64encode(b"short-but-secret").decode(), "16 bytes"),
        ("", "0 bytes"),
        ("caf\u00e9", "not base64"),
    ],
)
@both
def test_a_bad_key_is_named_by_its_place_only(algorithm: Algorithm, bad: str, problem: str) -> None:
    with pytest.raises(ConfigError, match="AGL_ENCRYPTION_KEYS: key 2 of 3") as caught:
        FieldCipher.from_environment(algorithm, {"AGL_ENCRYPTION_KEYS": f"{NEW},{bad},{OLD}"})
    text = repr(caught.value) + repr(caught.value.__cause__) + repr(caught.value.__context__)
    assert problem in text
    assert not bad or bad not in text
    assert NEW not in text


@both
def test_no_keys_and_repeated_keys_are_configuration_errors(algorithm: Algorithm) -> None:
    for environment in ({}, {"AGL_ENCRYPTION_KEYS": "  "}):
        with pytest.raises(ConfigError, match="AGL_ENCRYPTION_KEYS is not set"):
            FieldCipher.from_environment(algorithm, environment)
    with pytest.raises(ConfigError, match="key 2 of 2 is given twice"):
        FieldCipher(algorithm, [NEW, NEW])
    with pytest.raises(ConfigError, match="expected one key or more"):
        FieldCipher(algorithm, [])


def test_an_unknown_algorithm_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="expected aes-gcm or fernet, got 'rot13'"):
        FieldCipher("rot13", [NEW])  # type: ignore[arg-type]


def test_fernet_keys_of_the_library_fit() -> None:
    key = Fernet.generate_key().decode()
    cipher = FieldCipher.from_environment("fernet", {"AGL_ENCRYPTION_KEYS": f" {key} ,{OLD}"})
    sealed = cipher.encrypt(b"secret")
    plain = Fernet(key).decrypt(base64.urlsafe_b64encode(sealed[10:]))
    assert plain.endswith(b"secret"), "the token inside is an ordinary one"


def test_a_cipher_does_not_show_its_keys() -> None:
    cipher = CIPHERS["aes-gcm"]
    assert NEW not in repr(cipher) + repr(vars(cipher))
