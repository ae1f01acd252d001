"""Tables of attributes: what a file says, and every fault named with its place, value and way out."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr

from dpkd.data.attributes import AttributeTable, read_attributes, score_weights
from dpkd.errors import UserError

LESIONS = """
attributes:
  border: [smooth, notched, irregular]
  pigment: {none: 0, light: 0.3, dark: 1}
  colour: {one_of: [red, brown]}
  symmetry: graded
classes:
  melanoma: {border: irregular, pigment: dark, colour: brown, symmetry: 0.1}
  naevus: {border: 0.25, pigment: 0.5, symmetry: ~}
  no: {colour: red, border: "", symmetry: 1e-1}
  00014:
"""


def read(folder: Path, text: str, name: str = "table.yaml") -> AttributeTable:
    (folder / name).write_text(text)
    return read_attributes(str(folder / name))


def fault(folder: Path, text: str, name: str = "table.yaml") -> str:
    with pytest.raises(UserError) as caught:
        read(folder, text, name)
    message = str(caught.value)
    assert f"data.attributes {folder / name}" in message
    return message


def test_grades_numbers_and_options_become_values(tmp_path: Path) -> None:
    table = read(tmp_path, LESIONS)
    assert table.names == ("border", "pigment", "colour=red", "colour=brown", "symmetry")
    assert table.classes == ("melanoma", "naevus", "no", "00014")
    nan = np.nan
    expected = [[1, 1, 0, 1, 0.1], [0.25, 0.5, nan, nan, nan], [nan, nan, 1, 0, 0.1], [nan] * 5]
    np.testing.assert_array_equal(table.value_KA, np.array(expected, np.float32))
    assert table.value_KA.dtype == np.float32
    assert table.known()["no"] == {"colour=red": 1, "colour=brown": 0, "symmetry": 0.1}


def test_grades_called_by_numbers_count_by_their_place(tmp_path: Path) -> None:
    table = read(tmp_path, "attributes: {stage: [0, 1, 2]}\nclasses: {a: {stage: 1}, b: {stage: 2}, c: {stage: 0.7}}")
    np.testing.assert_allclose(table.value_KA[:, 0], [0.5, 1, 0.7])


def test_a_csv_says_the_same_as_a_yaml(tmp_path: Path) -> None:
    table = read(tmp_path, "\ufeffclass, border,symmetry\nmelanoma,1,0.1\n\n00014 , ,0.9\n", "table.csv")
    assert (table.names, table.classes) == (("border", "symmetry"), ("melanoma", "00014"))
    np.testing.assert_array_equal(table.value_KA, np.array([[1, 0.1], [np.nan, 0.9]], np.float32))


def test_rows_come_in_the_order_asked_for_and_a_missing_one_is_named_with_the_nearest(tmp_path: Path) -> None:
    table = read(tmp_path, LESIONS)
    np.testing.assert_array_equal(table.rows(["no", "melanoma"]), table.value_KA[[2, 0]])
    with pytest.raises(
        UserError, match=r"2 of 3 training classes.*'melanom' \(did you mean 'melanoma'\?\), 'scar'; add a row"
    ):
        table.rows(["melanom", "no", "scar"])


def changed(old: str, new: str) -> str:
    assert old in LESIONS
    return LESIONS.replace(old, new)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (changed("symmetry: 0.1", "symmetry: 1.1"), ["melanoma.symmetry", "1.1 is out of range", "0 to 1"]),
        (changed("symmetry: 0.1", "symmetry: nan"), ["melanoma.symmetry", "nan is out of range"]),
        (changed("symmetry: 0.1", "symmetry: high"), ["melanoma.symmetry", "'high' is not a number"]),
        (
            changed("border: irregular", "border: iregular"),
            ["melanoma.border", "'iregular' is not a grade (did you mean 'irregular'?)", "smooth, notched, irregular"],
        ),
        (changed("colour: brown,", "colour: bown,"), ["melanoma.colour", "'bown'", "did you mean 'brown'?"]),
        (changed("pigment: dark", "pigments: dark"), ["melanoma.pigments", "no such attribute", "'pigment'"]),
        (changed("pigment: dark", "size: 1"), ["melanoma.size", "declared are border, pigment, colour, symmetry"]),
        (changed("  naevus:", "  melanoma:"), ["'melanoma' is given twice"]),
        (changed("pigment: {none", "border: {none"), ["'border' is given twice"]),
        (changed("dark: 1}", "dark: 2}"), ["attributes.pigment", "2 is out of range"]),
        (changed("symmetry: graded", "symmetry: grade"), ["attributes.symmetry", "'grade'", "write graded, a list"]),
        (changed("[smooth, notched, irregular]", "[smooth]"), ["attributes.border", "two or more different grades"]),
        (
            changed("[smooth, notched, irregular]", "[a, b, a]"),
            ["attributes.border", "['a', 'b', 'a']", "different grades"],
        ),
        (changed("symmetry: graded", "symmetry: graded\n  depth: graded"), ["'depth' has no known value"]),
        (changed("colour: {one", '"colour=red": graded\n  colour: {one'), ["'colour=red' is given twice"]),
        (changed("naevus: {border: 0.25", "naevus: {border: [1]"), ["'naevus' has", "one value for each attribute"]),
        ("attributes: {}\nclasses: {a: {}}", ["`attributes` is empty"]),
        ("attributes: {x: graded}\nclasses: {}", ["`classes` is empty"]),
        ("attributes: {x: graded}\nclass: {a: {}}", ["sections must be `attributes` and `classes`"]),
        ("attributes: {x: graded}\nclasses: {a: {x: 1}}\nclases: {}", ["sections must be", "'clases'"]),
        ("attributes: {", ["cannot be read as .yaml"]),
        ("- 1", ["sections must be"]),
    ],
)
def test_a_fault_of_a_yaml_is_named(tmp_path: Path, text: str, named: list[str]) -> None:
    message = fault(tmp_path, text)
    assert all(words in message for words in named), message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("class,x\na,dark\n", ["a.x", "'dark' is not a number"]),
        ("class,x\na,-0.1\n", ["a.x", "-0.1 is out of range"]),
        ("class,x\na,1\na,0\n", ["the class 'a' is given twice"]),
        ("class,x,x\na,1,1\n", ["the attribute 'x' is given twice"]),
        ("class,x,y\na,1,\n", ["'y' has no known value"]),
        ("class\na\n", ["'class' and the attribute names"]),
        ("class,x\n", ["no classes"]),
        ("name,x\na,1\n", ["'class'", "name, x"]),
        ("", ["'class'", "nothing"]),
        ("class,x\na,1,1\n", ["row 2 has 3 cells", "write 2 cells"]),
        ('class,x\n"a,1\n', ["cannot be read as .csv"]),
    ],
)
def test_a_fault_of_a_csv_is_named(tmp_path: Path, text: str, named: list[str]) -> None:
    message = fault(tmp_path, text, "table.csv")
    assert all(words in message for words in named), message


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    message = fault(tmp_path, "class,x,y\n" + "".join(f"c{i},2,0.5\n" for i in range(20)), "table.csv")
    assert "20 faults" in message
    assert "c11.x" in message
    assert message.endswith("and 8 more")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml does not exist"):
        read_attributes(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(UserError, match=r"table.txt has another suffix: give a .yaml, .yml or .csv file"):
        read_attributes(str(tmp_path / "table.txt"))
    (tmp_path / "latin.csv").write_bytes("class,größe\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.csv cannot be read as .csv"):
        read_attributes(str(tmp_path / "latin.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"folder.csv cannot be read"):
        read_attributes(str(tmp_path / "folder.csv"))


CELLS = st.sampled_from(
    ["class", "x", "1", "0.5", "~", "[a, b]", "{a: 1}", ":", "- ", "{", "]", '"', ",", "\0", "&a", "*a"]
)
BYTES = st.binary(max_size=40) | st.lists(CELLS | st.text(max_size=3), max_size=12).map(
    lambda each: "".join(each).encode()
)


@given(st.integers(0, len(LESIONS)), st.integers(0, 20), BYTES, st.sampled_from(["yaml", "csv"]))
@settings(max_examples=200, deadline=None)
def test_a_file_of_any_bytes_is_a_table_or_refused(start: int, removed: int, inserted: bytes, suffix: str) -> None:
    whole = LESIONS.encode() if suffix == "yaml" else b"class,x,y\na,1,0\nb,0,0.5\n"
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"table.{suffix}"
        path.write_bytes(whole[:start] + inserted + whole[start + removed :])
        try:
            table = read_attributes(str(path))
        except UserError as error:
            assert str(error).startswith(f"data.attributes {path}")  # noqa: PT017 (either outcome is right)
        else:
            assert table.value_KA.shape == (len(table.classes), len(table.names))
            assert np.nanmin(table.value_KA) >= 0
            assert np.nanmax(table.value_KA) <= 1


def kl_scores(value_KA: np.ndarray, share_NA: np.ndarray) -> np.ndarray:
    """Minus the divergence of each row from each prediction, NK, by scipy."""
    one, other = value_KA[None], share_NA[:, None]
    return -(rel_entr(one, other) + rel_entr(1 - one, 1 - other)).sum(2)


def test_scores_are_the_divergences_of_rows_from_predictions() -> None:
    rng = np.random.default_rng(0)
    value_KA, logit_NA = np.round(rng.uniform(size=(6, 4)), 1), rng.normal(size=(20, 4)) * 2
    value_KA[0] = [0, 1, 1, 0]
    weight_KA, bias_K = score_weights(value_KA)
    score_NK = logit_NA @ weight_KA.T + bias_K
    expected_NK = kl_scores(value_KA, 1 / (1 + np.exp(-logit_NA)))
    np.testing.assert_allclose(
        score_NK - score_NK.mean(1, keepdims=True), expected_NK - expected_NK.mean(1, keepdims=True), atol=1e-5
    )


def test_a_prediction_that_equals_a_row_chooses_it_also_between_extremes() -> None:
    value_KA = np.array([[0.02], [0.5], [0.9], [0.98]])
    weight_KA, bias_K = score_weights(value_KA)
    logit_NA = np.log(value_KA / (1 - value_KA))
    assert (logit_NA @ weight_KA.T + bias_K).argmax(1).tolist() == [0, 1, 2, 3]


def test_what_is_not_known_of_a_class_counts_as_of_the_average_class() -> None:
    value_KA = np.array([[0.1, 0.7, np.nan], [0.9, np.nan, np.nan], [0.4, 0.2, np.nan]])
    weight_KA, bias_K = score_weights(value_KA)
    share_NA = np.random.default_rng(1).uniform(0.05, 0.95, size=(30, 3))
    logit_NA = np.log(share_NA / (1 - share_NA))
    score_NK = logit_NA @ weight_KA.T + bias_K
    own_NK = np.stack([kl_scores(value_KA[:, [a]], share_NA[:, [a]]) for a in (0, 1)])
    own_NK[1, :, 1] = own_NK[1][:, [0, 2]].mean(1)
    expected_NK = own_NK.sum(0)
    np.testing.assert_allclose(
        score_NK - score_NK.mean(1, keepdims=True), expected_NK - expected_NK.mean(1, keepdims=True), atol=1e-5
    )
