"""Which labels training sees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkd.data.labels import visible_labels
from dpkd.data.settings import AllLabels, LabelFraction, LabelsPerClass, ListedLabels
from dpkd.errors import UserError

LABELS = st.lists(st.integers(-1, 4), max_size=60).map(lambda labels: np.array(labels, np.int64))


def _keys(count: int) -> list[str]:
    return [f"class/{i:04d}" for i in range(count)]


@settings(max_examples=50, deadline=None)
@given(LABELS, st.integers(1, 20), st.integers(0, 2**70))
def test_at_most_count_labels_of_a_class_are_seen(label_N, count, seed):
    seen = visible_labels(label_N, LabelsPerClass(count=count), keys=_keys(len(label_N)), seed=seed)
    assert set(np.flatnonzero(seen != label_N)) <= set(np.flatnonzero(seen == -1))
    for label in range(5):
        assert np.count_nonzero(seen == label) == min(count, np.count_nonzero(label_N == label))


@settings(max_examples=50, deadline=None)
@given(LABELS, st.floats(0.01, 1))
def test_a_fraction_of_each_class_is_seen_and_one_at_least(label_N, fraction):
    seen = visible_labels(label_N, LabelFraction(fraction=fraction), keys=_keys(len(label_N)), seed=0)
    for label in np.unique(label_N[label_N >= 0]):
        size = np.count_nonzero(label_N == label)
        assert np.count_nonzero(seen == label) >= 1
        assert abs(np.count_nonzero(seen == label) - fraction * size) <= max(0.5, 1 - fraction * size)


def test_more_labels_include_the_fewer():
    label_N = np.arange(200) % 5
    seen = [visible_labels(label_N, LabelsPerClass(count=n), keys=_keys(200), seed=4) >= 0 for n in (1, 5, 20)]
    assert not np.any(seen[0] & ~seen[1])
    assert not np.any(seen[1] & ~seen[2])


def test_the_choice_does_not_depend_on_how_samples_are_packed():
    label_N, keys = np.arange(100) % 4, _keys(100)
    shuffle = np.random.default_rng(0).permutation(100)
    shuffled_keys = [keys[i] for i in shuffle]
    seen = visible_labels(label_N, LabelsPerClass(count=3), keys=keys, seed=1)
    again = visible_labels(label_N[shuffle], LabelsPerClass(count=3), keys=shuffled_keys, seed=1)
    np.testing.assert_array_equal(again, seen[shuffle])


def test_seeds_choose_differently_and_all_labels_stay():
    label_N = np.arange(100) % 4
    first, second = (visible_labels(label_N, LabelsPerClass(count=3), keys=_keys(100), seed=seed) for seed in (0, 1))
    assert np.any(first != second)
    np.testing.assert_array_equal(visible_labels(label_N, AllLabels(), keys=_keys(100), seed=0), label_N)


def test_listed_labels_are_those_of_the_file(tmp_path):
    label_N = np.array([3, 1, -1, 2])
    listed = tmp_path / "labels.txt"
    listed.write_text("class/0003\n\nclass/0000  \n")
    seen = visible_labels(label_N, ListedLabels(path=str(listed)), keys=_keys(4), seed=0)
    assert seen.tolist() == [3, -1, -1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("class/0000\nclas/0001\n", r"1 of the listed keys .* not in the training split .* 'clas/0001'"),
        ("class/0002\n", "1 of the listed keys have no label, such as 'class/0002'"),
        ("\n", "lists no key"),
    ],
)
def test_a_list_that_does_not_fit_names_file_and_keys(tmp_path, content, message):
    listed = tmp_path / "labels.txt"
    listed.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        visible_labels(np.array([3, 1, -1]), ListedLabels(path=str(listed)), keys=_keys(3), seed=0)
    assert str(listed) in str(caught.value)


def test_a_missing_list_names_the_setting_and_the_file(tmp_path):
    with pytest.raises(UserError, match=r"data\.labels\.path=.*nowhere\.txt"):
        visible_labels(np.array([0]), ListedLabels(path=str(tmp_path / "nowhere.txt")), keys=["a"], seed=0)


@settings(max_examples=50, deadline=None)
@given(LABELS, st.integers(1, 20), st.data())
def test_another_label_takes_the_place_of_one_that_cannot_be_read(label_N, count, data):
    lost = np.array(sorted(data.draw(st.sets(st.integers(0, len(label_N) - 1)))) if len(label_N) else [], np.int64)
    keys = _keys(len(label_N))
    seen = visible_labels(label_N, LabelsPerClass(count=count), keys=keys, seed=3, unreadable=lost)
    left = np.delete(np.arange(len(label_N)), lost)
    of_those_left = visible_labels(
        label_N[left], LabelsPerClass(count=count), keys=[keys[i] for i in left.tolist()], seed=3
    )
    np.testing.assert_array_equal(seen[left], of_those_left)
    assert (seen[lost] == -1).all()


def test_a_listed_key_that_cannot_be_read_shows_no_label_and_stops_nothing(tmp_path):
    keys, label_N = _keys(4), np.array([0, 1, 0, 1])
    (tmp_path / "listed.txt").write_text("\n".join(keys[:2]))
    settings = ListedLabels(path=str(tmp_path / "listed.txt"))
    seen = visible_labels(label_N, settings, keys=keys, seed=0, unreadable=np.array([1]))
    assert seen.tolist() == [0, -1, -1, -1]
    assert visible_labels(label_N, AllLabels(), keys=keys, seed=0, unreadable=np.array([1])).tolist() == [0, -1, 0, 1]
