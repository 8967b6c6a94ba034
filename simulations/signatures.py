"""Signatures of the virtual world: a keyed hash of the same shape as Ed25519, thirty times cheaper.

A `Keyring` knows everybody's secret and checks with it; a peer is given only the signer of its own key. So nobody, a liar
included, can sign for another, which is all that the protocol asks of a signature. Peer ids have their real form. A keyring
of Ed25519 keys has the same interface: one test runs the same world on both.
"""

from __future__ import annotations

from hashlib import blake2b
from hmac import compare_digest

from p2pcoord.identity import Ed25519Signer, Signer, peer_id_of, verify_ed25519
from simulations.randomness import derive

SIGNATURE_BYTES = 64
"""As long as an Ed25519 signature, so that messages have their real sizes."""


class KeyedHashSigner:
    """Signs with a secret that the keyring knows too."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.peer_id = peer_id_of(blake2b(secret, digest_size=32, person=b"public key").digest())

    def sign(self, data: bytes) -> bytes:
        return blake2b(data, digest_size=SIGNATURE_BYTES, key=self._secret).digest()


class Keyring:
    """The keys of one world. `real` takes Ed25519 instead of the keyed hash."""

    def __init__(self, seed: int, *, real: bool = False) -> None:
        self._seed = seed
        self._real = real
        self._signers: dict[str, KeyedHashSigner] = {}

    def signer(self, name: str) -> Signer:
        """The key of this name: the same one at every call."""
        secret = derive(self._seed, "key", name)
        if self._real:
            return Ed25519Signer(secret)
        signer = KeyedHashSigner(secret)
        return self._signers.setdefault(signer.peer_id, signer)

    def verify(self, peer_id: str, data: bytes, signature: bytes) -> bool:
        """Whether `peer_id` signed `data` (identity.Verify)."""
        if self._real:
            return verify_ed25519(peer_id, data, signature)
        signer = self._signers.get(peer_id)
        return signer is not None and compare_digest(signer.sign(data), signature)
