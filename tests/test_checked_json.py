"""A changed bit in a JSON object shows, wherever it is."""

import json

import pytest

from dpkd.io.record import checked, parse_checked

CONTENT = {"steps": {"417": "nan"}, "mean": [0.47, 1e-7, 3], "name": "Zürich \N{BLACK STAR}", "none": None, "yes": True}


def read(data: bytes) -> dict | None:
    try:
        return parse_checked(data)
    except ValueError:
        return None


def test_an_object_comes_back_without_its_checksum():
    assert parse_checked(checked(CONTENT)) == CONTENT
    assert list(parse_checked(checked(CONTENT))) == list(CONTENT)


def test_every_flipped_bit_is_noticed_or_changes_nothing():
    data = checked(CONTENT)
    for at in range(len(data)):
        flips = [data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :] for bit in range(8)]
        for found in filter(None, map(read, flips)):
            assert {key: found.get(key) for key in CONTENT} == CONTENT


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"7", b'{"a": 1, "checksum": 7}', b'{"a": 1, "checksum": "x"}', b"[" * 9999]
)
def test_what_is_no_such_object_is_refused(data):
    with pytest.raises(ValueError, match=r".+"):
        parse_checked(data)


def test_an_object_without_a_checksum_is_refused():
    with pytest.raises(ValueError, match="checksum"):
        parse_checked(json.dumps(CONTENT).encode())
