"""Pickles are checked before they are loaded, without building anything."""

from __future__ import annotations

import os
import pickle
import re
import struct
import time

import pytest

from bitdance.runtime.pickle_guard import MAX_OPCODES, UnsafePickleError, check_pickle

ALLOWED = re.compile(r"collections OrderedDict|_codecs encode")
LIMIT = 1 << 24
DATA = {"a": [1, (2, 3.5), "x" * 300, b"bytes", None], "b": {("k", 1): (), 3: [[[]]]}, "c": 1 << 70}


@pytest.mark.parametrize("protocol", range(6))
def test_harmless_pickles_pass_and_are_measured(protocol: int) -> None:
    data = pickle.dumps(DATA, protocol)
    assert check_pickle(data, ALLOWED, LIMIT) == check_pickle(data + b"more", ALLOWED, LIMIT) == len(data)
    assert check_pickle(data, ALLOWED, len(data)) == len(data)
    with pytest.raises(UnsafePickleError, match="bytes"):
        check_pickle(data, ALLOWED, len(data) - 1)


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_named(protocol: int) -> None:
    with pytest.raises(UnsafePickleError, match="carries code") as caught:
        check_pickle(pickle.dumps([os.system], protocol), ALLOWED, LIMIT)
    assert caught.value.code == f"{os.system.__module__}.system"


def text(word: str) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word.encode()


STRINGS = b"".join(text(word) + b"\x94" for word in ("os", "system", "collections", "OrderedDict"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (STRINGS + b"h\x00h\x01\x93", "carries code .os.system"),  # whatever strings come last, the memo counts
        (b"\x82\x01", "an extension code"),
        (b"(S'x'\nios\nsystem\n", "carries code .os.system"),
        (b"}K\x01\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s", "nested tuples"),  # doubled through the memo
        (b"}K\x01\x85" + b"2\x86" * 60 + b"K\x01s", "nested tuples"),  # doubled by DUP
        (b"})" + b"\x85" * 100_000 + b"K\x01s", "nested tuples"),
        (b"(" + b"N" * 1001 + b"t", "nested tuples"),
        (b"N0" * MAX_OPCODES + b"N", "opcodes"),
        (b"B" + struct.pack("<I", 1 << 25) + bytes(1 << 25), "bytes"),
    ],
)  # fmt: skip
def test_hostile_pickles_are_refused_quickly(data: bytes, words: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UnsafePickleError, match=words):
        check_pickle(b"\x80\x04" + data + b".", ALLOWED, LIMIT)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "data",
    [
        b"", b"hello", b"<html></html>", bytes(100), b"\x80\x04N", b"e.", b"h\x05.", b"cos.path\n\n.",
        b"Nr\xff\xff\xff\x7f.", b"Np2147483647\n.",  # the unpickler would allocate the memo up to this index
        b"B\xff\xff\xff\x7fxyz.", b"\x8e" + bytes([255] * 7) + b"\x00xyz.",  # longer strings than there are bytes
    ],
)  # fmt: skip
def test_what_is_damaged_or_no_pickle_raises_another_error(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError, KeyError)) as caught:
        check_pickle(data, ALLOWED, LIMIT)
    assert not isinstance(caught.value, UnsafePickleError)
