"""Encryption of single values at rest: AES-GCM or Fernet, with several keys at once so that they can be changed.

What it is: `FieldCipher`. The newest key encrypts, every key decrypts; an encrypted value starts with the id of its key. A value is bound
to what it belongs to (names that the caller gives both times): moved to another record, it does not decrypt. There is no
fallback: what cannot be decrypted is a StoreError that says why, and never comes back as it is, as nothing, or as a marker.
Keys come from AGL_ENCRYPTION_KEYS, comma separated, newest first; `FieldCipher.new_key` makes one. AES-GCM takes 32 bytes in base64 and a
fresh 96-bit nonce per value (use one key for less than 2^32 values); Fernet takes its own keys and is ten times slower.
Who calls it: `agl_ray.store.journals.encrypted`. Test alone: tests/unit/test_ops_encryption.py.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from agl_ray.types import ConfigError, StoreError

Algorithm = Literal["aes-gcm", "fernet"]
KEYS_VARIABLE = "AGL_ENCRYPTION_KEYS"
KEY_BYTES = 32
NONCE_BYTES = 12
ID_BYTES = 8

_TAGS: dict[Algorithm, bytes] = {"aes-gcm": b"\xea\x01", "fernet": b"\xea\x02"}
HEADER_BYTES = 2 + ID_BYTES


class _Key(NamedTuple):
    encrypt: Callable[[bytes, bytes], bytes]  # (value, binding) -> sealed value without its header
    decrypt: Callable[[bytes, bytes], bytes | None]  # None: damaged, or bound to something else


class FieldCipher:
    """Encrypts and decrypts values with `keys` (newest first). ConfigError names the place of a bad key, never the key."""

    def __init__(self, algorithm: Algorithm, keys: Sequence[str], source: str = "keys") -> None:
        if algorithm not in _TAGS:
            raise ConfigError(
                f"store.encryption: expected aes-gcm or fernet, got {algorithm!r} ('off' needs no cipher)"
            )
        if not keys:
            raise ConfigError(f"{source}: expected one key or more, got none")
        self.algorithm = algorithm
        self.source = source
        self._keys: dict[bytes, _Key] = {}
        for place, text in enumerate(keys, 1):
            where = f"{source}: key {place} of {len(keys)}"
            secret = _decoded(text, where)
            key_id = hashlib.sha256(b"agl_ray key id\0" + secret).digest()[:ID_BYTES]
            if key_id in self._keys:
                raise ConfigError(f"{where} is given twice; leave one of them out")
            self._keys[key_id] = _aes_gcm(secret) if algorithm == "aes-gcm" else _fernet(secret)
        self._newest = next(iter(self._keys))

    @classmethod
    def from_environment(
        cls, algorithm: Algorithm, environment: Mapping[str, str] | None = None
    ) -> FieldCipher:
        """With the keys of AGL_ENCRYPTION_KEYS; ConfigError where it is not set."""
        text = (os.environ if environment is None else environment).get(KEYS_VARIABLE, "")
        if not text.strip():
            raise ConfigError(
                f"store.encryption is {algorithm} and {KEYS_VARIABLE} is not set; set it to one key or more, comma "
                f'separated, newest first (make one: python -c "from agl_ray.ops.encryption import FieldCipher; '
                f'print(FieldCipher.new_key())"), and keep it somewhere else than the data'
            )
        return cls(algorithm, [key.strip() for key in text.split(",")], KEYS_VARIABLE)

    @staticmethod
    def new_key() -> str:
        """A random key that fits both algorithms: 32 bytes in URL-safe base64, 44 characters."""
        return base64.urlsafe_b64encode(os.urandom(KEY_BYTES)).decode()

    @property
    def key_ids(self) -> list[str]:
        """Newest first. An id says nothing about its key (8 bytes of a SHA-256)."""
        return [key_id.hex() for key_id in self._keys]

    def encrypt(self, value: bytes, *belongs_to: str) -> bytes:
        """`value` sealed with the newest key and bound to `belongs_to`: 38 bytes longer (AES-GCM) or up to 105 (Fernet)."""
        header = _TAGS[self.algorithm] + self._newest
        return header + self._keys[self._newest].encrypt(value, _binding(header, belongs_to))

    def decrypt(self, sealed: bytes, *belongs_to: str) -> bytes:
        """What `encrypt` was given. StoreError: not encrypted, key not here, damaged, or of something else."""
        header = bytes(sealed[:HEADER_BYTES])
        key_id = self.key_id(sealed, *belongs_to)
        key = self._keys.get(bytes.fromhex(key_id))
        name = "/".join(belongs_to)
        if key is None:
            raise StoreError(
                f"{name}: it is encrypted with the key {key_id}, and {self.source} has only {', '.join(self.key_ids)}; "
                "without that key it cannot be read; add it at the end of the list"
            )
        value = key.decrypt(bytes(sealed[HEADER_BYTES:]), _binding(header, belongs_to))
        if value is None:
            raise StoreError(
                f"{name}: its encrypted value was changed, cut, or moved here from another record; restore it from a copy"
            )
        return value

    def key_id(self, sealed: bytes, *belongs_to: str) -> str:
        """The id of the key that sealed a value. StoreError where this is no value of this cipher's algorithm."""
        tag = bytes(sealed[:2])
        if tag != _TAGS[self.algorithm] or len(sealed) < HEADER_BYTES:
            other = next((name for name, one in _TAGS.items() if one == tag), None)
            found = f"one of {other}" if other and tag != _TAGS[self.algorithm] else "none"
            raise StoreError(
                f"{'/'.join(belongs_to) or 'encrypted value'}: expected a value encrypted with {self.algorithm}, got {found}"
            )
        return bytes(sealed[2:HEADER_BYTES]).hex()

    def needs_rotation(self, sealed: bytes) -> bool:
        """Whether a value is sealed with another key than the newest."""
        return self.key_id(sealed) != self._newest.hex()

    def rotate(self, sealed: bytes, *belongs_to: str) -> bytes:
        """The same value sealed with the newest key (the same bytes where it is already)."""
        if not self.needs_rotation(sealed):
            return sealed
        return self.encrypt(self.decrypt(sealed, *belongs_to), *belongs_to)


def _decoded(text: str, where: str) -> bytes:
    """The 32 bytes of a key in base64 (both alphabets). The error must not show the key, so it has no cause."""
    try:
        secret = base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        problem = "it is not base64"
    else:
        if len(secret) == KEY_BYTES:
            return secret
        problem = f"it is {len(secret)} bytes"
    raise ConfigError(
        f"{where}: expected {KEY_BYTES} bytes in base64 (44 characters), but {problem}; make one with FieldCipher.new_key()"
    )


def _binding(header: bytes, belongs_to: Sequence[str]) -> bytes:
    """Names end to end with their lengths, so that no two lists of names give the same bytes."""
    parts = [name.encode("utf-8", "surrogatepass") for name in belongs_to]
    return header + b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _aes_gcm(secret: bytes) -> _Key:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    cipher = AESGCM(secret)

    def encrypt(value: bytes, binding: bytes) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + cipher.encrypt(nonce, value, binding)

    def decrypt(sealed: bytes, binding: bytes) -> bytes | None:
        try:
            return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], binding)
        except (InvalidTag, ValueError):  # ValueError: too short for a nonce
            return None

    return _Key(encrypt, decrypt)


def _fernet(secret: bytes) -> _Key:
    """Fernet has no associated data: the digest of the binding goes inside, in front of the value."""
    from cryptography.fernet import Fernet, InvalidToken

    fernet = Fernet(base64.urlsafe_b64encode(secret))

    def encrypt(value: bytes, binding: bytes) -> bytes:
        token = fernet.encrypt(hashlib.sha256(binding).digest() + value)
        return base64.urlsafe_b64decode(token)  # a third shorter

    def decrypt(sealed: bytes, binding: bytes) -> bytes | None:
        try:
            inner = fernet.decrypt(base64.urlsafe_b64encode(sealed))
        except InvalidToken:
            return None
        return inner[32:] if inner[:32] == hashlib.sha256(binding).digest() else None

    return _Key(encrypt, decrypt)
