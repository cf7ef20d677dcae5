"""What identifies a block: its tokens, or a ready key of a trace; and the scope that it is shared in."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ssmcache.integers import is_integer, to_integer

Int64Array = npt.NDArray[np.int64]
EdgeKey = int | bytes

_DIGEST_BYTES = 32
_INT64 = np.dtype(np.int64)
_MAX_TOKEN = np.iinfo(np.int64).max
_NO_ID = np.iinfo(np.int64).min  # of a digest that no sequence has had


class KeyKind:
    """How the blocks of one scope are told apart; a scope never mixes kinds.

    Keys of n blocks are one flat [n * width] int64 array: the tokens of each block, or one ready key for it.
    Tokens are compared, never hashed into an identity, so there is nothing to collide.
    """

    __slots__ = ("prefix_unique", "width")

    def __init__(self, width: int, prefix_unique: bool) -> None:
        self.width = width
        self.prefix_unique = prefix_unique

    def edge_key(self, keys: Int64Array, block: int) -> EdgeKey:
        """What a dict of children finds the block by: exact, it holds the whole key."""
        width = self.width
        if width == 1:
            key: int = keys.item(block)
            return key
        return keys[block * width : (block + 1) * width].tobytes()

    def common_blocks(self, left: Int64Array, left_start: int, right: Int64Array, right_start: int, num: int) -> int:
        """Number of leading equal blocks among `num` (>= 1) of two arrays, from block `left_start` of the one and
        `right_start` of the other on.

        Cost: O(1) for ready keys that agree to the end, since they name the whole prefix; else one comparison.
        """
        if self.prefix_unique and left.item(left_start + num - 1) == right.item(right_start + num - 1):
            return num
        width = self.width
        left_part = left[left_start * width : (left_start + num) * width]
        differs = left_part != right[right_start * width : (right_start + num) * width]
        first = int(differs.argmax())
        if not differs[first]:
            return num
        return first // width

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyKind) and (self.width, self.prefix_unique) == (other.width, other.prefix_unique)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "ready block keys" if self.prefix_unique else f"tokens in blocks of {self.width}"


class ReuseScope(NamedTuple):
    """Who may share blocks: sequences of equal scope only. Absent (None) and 0 are different scopes."""

    lora_id: int | None = None
    salt: int | None = None


def check_scope(call: str, scope: object) -> None:
    """Errors: TypeError for anything but a `ReuseScope` of integers, or None in their place."""
    if type(scope) is not ReuseScope:
        raise TypeError(f"{call}: expected a ReuseScope, got {scope!r}")
    for name, value in zip(scope._fields, scope, strict=True):
        if value is not None and not is_integer(value):  # True would be the same scope as 1
            raise TypeError(f"{call}: expected an integer or None as {name} of the scope, got {value!r}")


class BlockKeys:
    """Ready keys in place of tokens: a prompt of which only the identity of each full block is known.

    Args:
        keys: [num_full_blocks] int64, unique per *prefix*: two prompts have an equal key at block i only if all
            their tokens up to the end of block i are equal. Kept without a copy if it is a read-only array; if that is
            a part of a longer one, the cache may keep all of it for as long as it has one of its blocks.
        tokens_per_block: tokens that one key stands for.
        num_tokens: length of the prompt; a last block that is not full has no key.

    `prompt[a:b]` is the part from token a up to token b, a view (no copy, O(1)). A part remembers the keys beyond
    its end: `prompt[:-1]` may know the key of a block whose last token it leaves out, and a lookup then finds the
    KV of that block, although the prompt itself does not skip the token.

    Errors: ValueError when a full block has no key, or keys are no integers of 64 bits.
    """

    __slots__ = ("keys", "start", "stop", "tokens_per_block")

    def __init__(self, keys: npt.ArrayLike, tokens_per_block: int, num_tokens: int) -> None:
        if type(tokens_per_block) is not int or tokens_per_block <= 0:  # made for every request of a replay
            tokens_per_block = to_integer("BlockKeys", "tokens_per_block", tokens_per_block, 1)
        if type(num_tokens) is not int or num_tokens < 0:
            num_tokens = to_integer("BlockKeys", "num_tokens", num_tokens)
        array = np.asarray(keys)
        if array.dtype is not _INT64:
            if array.size and array.dtype.kind not in "iu":
                raise ValueError(f"keys of BlockKeys: expected integers of 64 bits, got {array.dtype}")
            array = array.astype(np.int64, copy=False)  # those without a sign stay as different as they are
        if array.flags.writeable:
            array = array.copy()
            array.flags.writeable = False
        if array.ndim != 1 or array.size != num_tokens // tokens_per_block:
            raise ValueError(
                f"keys of a prompt of {num_tokens} tokens in blocks of {tokens_per_block}: expected shape "
                f"({num_tokens // tokens_per_block},), got {array.shape}"
            )
        self.keys: Int64Array = array
        self.tokens_per_block = tokens_per_block
        self.start = 0
        self.stop = num_tokens

    def __repr__(self) -> str:
        return f"BlockKeys(tokens {self.start:,} to {self.stop:,}, blocks of {self.tokens_per_block:,})"

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: slice) -> "BlockKeys":
        first = self.start
        start, stop, step = part.indices(self.stop - first)
        if step != 1:
            raise ValueError(f"part of BlockKeys: expected step 1, got {step}")
        view = BlockKeys.__new__(BlockKeys)
        view.keys = self.keys
        view.tokens_per_block = self.tokens_per_block
        view.start = first + start
        view.stop = first + (stop if stop > start else start)
        return view


class TokenIds:
    """Tokens as integers: multimodal items, named by 32-byte digests, get negative ids of their own.

    An id is kept for good, so that equal digests stay equal: 100 bytes or so for each item ever seen.
    """

    __slots__ = ("_digests", "_ids")

    def __init__(self) -> None:
        self._ids: dict[bytes, int] = {}
        self._digests: list[bytes] = []

    def digest_of(self, token_id: int) -> bytes:
        """The digest that a negative id stands for."""
        return self._digests[-1 - token_id]

    def _id_of(self, digest: bytes) -> int:
        known = self._ids.get(digest)
        if known is None:
            self._digests.append(digest)
            known = self._ids[digest] = -len(self._digests)
        return known

    def array(self, tokens: "Tokens", keep_digests: bool = True) -> Int64Array:
        """[n] int64, a copy. Digests that are new are kept for good, or, where they are only compared, all named by an
        id that nothing else has. Errors: ValueError unless all are integers >= 0 or digests, in one dimension.
        """
        array = np.array(tokens)
        if array.size == 0:
            return np.empty(0, dtype=np.int64)
        if array.dtype.kind in "SO" and any(isinstance(token, bytes) for token in tokens):  # type: ignore[union-attr]
            return self._with_digests(tokens, keep_digests)  # type: ignore[arg-type]
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"tokens: expected integers in one dimension, got {array.dtype} of shape {array.shape}")
        if array.min() < 0:
            raise ValueError(f"tokens: expected integers >= 0, got {array.min()}")
        if array.dtype.kind == "u" and array.max() > _MAX_TOKEN:
            raise ValueError(f"tokens: expected integers up to {_MAX_TOKEN}, got {array.max()}")
        return array.astype(np.int64, copy=False)

    def _with_digests(self, tokens: "Sequence[int | bytes]", keep: bool) -> Int64Array:
        for token in tokens:
            if isinstance(token, bytes) and len(token) != _DIGEST_BYTES:
                raise ValueError(f"tokens: expected digests of {_DIGEST_BYTES} bytes, got one of {len(token)}")
        integers = self.array([token for token in tokens if not isinstance(token, bytes)])
        known = iter(integers.tolist())
        if keep:
            ids = [self._id_of(token) if isinstance(token, bytes) else next(known) for token in tokens]
        else:
            ids = [self._ids.get(token, _NO_ID) if isinstance(token, bytes) else next(known) for token in tokens]
        return np.array(ids, dtype=np.int64)


Tokens = Sequence[int] | Sequence[int | bytes] | npt.NDArray[np.integer] | BlockKeys
