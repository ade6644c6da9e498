"""Encryption at rest: AES-256-GCM, with a key from the environment; needs `cryptography`.

    nonce (12 bytes) | ciphertext | tag (16 bytes)

The tag also covers a context that is not stored with it. Who changes the context, or puts the file
into another one, cannot read it any more.
"""

import base64
import binascii
import hashlib
import os
from typing import Any

from safemoe_jax.errors import UserError

KEY_VARIABLE = "SAFEMOE_BUNDLE_KEY"
CIPHER = "AES-256-GCM"
_KEY_BYTES, _NONCE_BYTES, _TAG_BYTES = 32, 12, 16


class Unreadable(Exception):
    """Another key, another context, or changed bytes: which of them cannot be told."""


def key_from_environment() -> bytes | None:
    """The key, None where none is set; without one nothing is encrypted.

    Raises:
      UserError: where the variable holds no key, or `cryptography` is missing. Its value is not
        shown.
    """
    text = os.environ.get(KEY_VARIABLE)
    if text is None:
        return None
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        key = b""
    if len(key) != _KEY_BYTES:
        raise UserError(
            f"{KEY_VARIABLE} has {len(text)} characters and is not the base64 of {_KEY_BYTES} "
            "bytes; set it to what `openssl rand -base64 32` prints, or unset it"
        )
    _ciphers()
    return key


def key_id(key: bytes) -> str:
    """What tells keys apart; a key of random bytes cannot be guessed from it."""
    return hashlib.sha256(b"safemoe bundle key\n" + key).hexdigest()[:12]


def encrypt(content: bytes, key: bytes, context: bytes) -> bytes:
    """Encrypts up to 64 GiB under a random nonce; a key is good for 2^32 files."""
    ciphers, nonce = _ciphers(), os.urandom(_NONCE_BYTES)
    encryptor = ciphers.Cipher(ciphers.algorithms.AES(key), ciphers.modes.GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(context)
    return b"".join((nonce, encryptor.update(content), encryptor.finalize(), encryptor.tag))


def decrypt(content: bytes, key: bytes, context: bytes) -> bytes:
    """The inverse of `encrypt`.

    Raises:
      Unreadable: where key, context or a bit of the content is another.
    """
    from cryptography.exceptions import InvalidTag

    ciphers, ends = _ciphers(), len(content) - _TAG_BYTES
    if ends < _NONCE_BYTES:
        raise Unreadable
    mode = ciphers.modes.GCM(content[:_NONCE_BYTES], content[ends:])
    decryptor = ciphers.Cipher(ciphers.algorithms.AES(key), mode).decryptor()
    decryptor.authenticate_additional_data(context)
    try:
        return decryptor.update(content[_NONCE_BYTES:ends]) + decryptor.finalize()
    except InvalidTag:
        raise Unreadable from None


def _ciphers() -> Any:
    try:
        from cryptography.hazmat.primitives import ciphers
    except ImportError as error:
        raise UserError(
            f"{KEY_VARIABLE} is set and `cryptography` is not installed; `pip install -e "
            "'.[encryption]'` in the checkout, or unset the variable"
        ) from error
    return ciphers
