"""A quarantine, an evaluation and JSON of any bytes are read, passed over, or refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpkd.errors import UserError
from dpkd.io.record import MAX_DEPTH, parse_json
from dpkd.report.summary import write_summary
from tests.fuzz.damage import outcome

BOMBS = st.sampled_from(
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
        b"[1]",
        b"7",
        b'"\\ud800"',
        b"\xff\xfe",
        b"null",
    ]
)


@pytest.mark.parametrize("data", [b"", b'{"teacher": {"few_sh', b"\xff\xfe"])
def test_an_evaluation_that_is_cut_short_is_refused_by_its_name(data, tmp_path):
    (tmp_path / "evaluation.json").write_bytes(data)
    with pytest.raises(UserError, match=r"evaluation\.json cannot be read"):
        write_summary(tmp_path)


@given(
    st.binary(max_size=40)
    | st.recursive(st.none() | st.floats(), st.lists, max_leaves=9).map(lambda v: json.dumps(v).encode())
)
def test_json_is_read_as_the_standard_library_does_or_refused(data):
    try:
        expected = json.loads(data)
    except ValueError:
        with pytest.raises(ValueError, match=r".+"):
            parse_json(data)
        return
    if outcome(lambda: parse_json(data)) is None:
        assert repr(parse_json(data)) == repr(expected)


def test_json_may_nest_as_deep_as_it_says_and_no_deeper():
    assert parse_json("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH)
    for depth in (MAX_DEPTH + 1, 500, 100_000):
        with pytest.raises(ValueError, match="inside one another"):
            parse_json("[" * depth + "1" + "]" * depth)
