import random
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpkd.data.settings import ClassSplits, FileSplits, FractionSplits, GivenSplits
from dpkd.data.sources.records import Blob, Record, keys_of, sorted_classes
from dpkd.data.splits import assign, group_by_pattern
from dpkd.errors import UserError


def records(*places: tuple[str | None, str | None]) -> list[Record]:
    """(class, group) of each sample."""
    return [Record(f"{i:04d}.jpg", Blob("x"), class_name=name, group=group) for i, (name, group) in enumerate(places)]


def assigned(samples: list[Record], splits, *, seed: int = 0, listed=None) -> dict[str, str | None]:
    found = assign(samples, splits, seed=seed, train="train", listed=listed or {})
    return {record.name: split for record, split in zip(samples, found.splits, strict=True)}


FRACTIONS = FractionSplits(fractions={"train": 0.6, "val": 0.2, "test": 0.2})


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("0123456789")), min_size=60, max_size=120),
    st.integers(0, 5),
)
def test_a_fraction_split_never_cuts_a_group_and_does_not_depend_on_the_order(places, seed):
    samples = records(*((name, name + group) for name, group in places))
    assume(len({name + group for name, group in places}) >= 12)  # few large groups may leave a split empty, an error
    split_of = assigned(samples, FRACTIONS, seed=seed)
    by_group = {record.group: split_of[record.name] for record in samples}
    assert all(split_of[record.name] == by_group[record.group] for record in samples)
    random.Random(seed).shuffle(samples)
    assert assigned(samples, FRACTIONS, seed=seed) == split_of


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 30), min_size=3), st.integers(0, 9))
def test_a_fraction_split_of_single_samples_is_stratified(counts, seed):
    samples = records(*((name, None) for name, count in counts.items() for _ in range(count)))
    if len(samples) < 10:
        return
    split_of = assigned(samples, FRACTIONS, seed=seed)
    totals = Counter(split_of.values())
    for split, fraction in FRACTIONS.fractions.items():
        assert abs(totals[split] - fraction * len(samples)) <= 1
        for name, count in counts.items():
            here = sum(split_of[r.name] == split for r in samples if r.class_name == name)
            assert abs(here - fraction * count) <= 2


def test_samples_without_a_label_train_where_others_have_one():
    samples = records(*(("a", None) for _ in range(20)), *((None, None) for _ in range(30)), ("a", "g"), (None, "g"))
    split_of = assigned(samples, FRACTIONS)
    assert Counter(split_of[f"{i:04d}.jpg"] for i in range(20, 50)) == {"train": 30}
    assert Counter(split_of[f"{i:04d}.jpg"] for i in range(20)).total() == 20
    assert split_of["0050.jpg"] == split_of["0051.jpg"]
    unlabelled = records(*((None, None) for _ in range(50)))
    assert Counter(assigned(unlabelled, FRACTIONS).values()) == {"train": 30, "val": 10, "test": 10}


def test_another_seed_draws_another_split():
    samples = records(*(("a", None) for _ in range(50)))
    assert assigned(samples, FRACTIONS, seed=0) != assigned(samples, FRACTIONS, seed=1)


def test_class_splits_keep_classes_apart_and_put_unlabelled_samples_into_training():
    samples = records(*((name, None) for name in "aabbccddee"), (None, None))
    split_of = assigned(samples, ClassSplits(classes={"train": 2, "val": ("c",), "test": 1}))
    by_class = {record.class_name: split_of[record.name] for record in samples}
    assert all(split_of[record.name] == by_class[record.class_name] for record in samples)
    assert by_class["c"] == "val"
    assert by_class[None] == "train"
    assert Counter(by_class[name] for name in "abde") == {"train": 2, "test": 1, None: 1}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"train": 4}, "needs 4 classes, and the source has 3"),
        ({"train": ("cat", "dgo")}, r"'dgo', not a class of the source \(did you mean 'dog'\?\)"),
        ({"train": ("cat",), "val": ("cat",)}, "has 'cat' in 'train' and in 'val'"),
    ],
)
def test_class_splits_that_cannot_be_had_are_refused(classes, message):
    with pytest.raises(UserError, match=message):
        assigned(records(("cat", None), ("dog", None), ("owl", None)), ClassSplits(classes=classes))


def test_one_class_only_cannot_be_split_by_class():
    with pytest.raises(UserError, match="needs 3 classes, and the source has 1"):
        assigned(records(*[("only", None)] * 9), ClassSplits(classes={"train": 1, "val": 1, "test": 1}))


def test_fractions_that_do_not_sum_to_one_or_leave_a_split_empty_are_refused():
    with pytest.raises(UserError, match="sum to 1"):
        assigned(records(("a", None)), FractionSplits(fractions={"train": 0.8, "val": 0.1}))
    with pytest.raises(UserError, match=r"gives the split 'test' no sample \(2 samples"):
        assigned(records(*[("a", None)] * 2), FRACTIONS)


def test_a_group_that_given_splits_would_cut_is_refused_by_name():
    samples = [
        Record("train/p1_0.jpg", Blob("x"), split="train"),
        Record("test/p1_1.jpg", Blob("x"), split="test"),
    ]
    grouped, stray = group_by_pattern(samples, r"/(p\d+)_")
    assert ([record.group for record in grouped], stray) == (["p1", "p1"], [])
    with pytest.raises(UserError, match=r"group 'p1' would be cut: train/p1_0.jpg is in split 'train' and test/p1_1"):
        assign(grouped, GivenSplits(), seed=0, train="train", listed={})


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "not a regular expression"), ("abc", "no group"), ("(zzz)", "matches no sample.*'0000.jpg'")],
)
def test_group_patterns_that_cannot_be_used_are_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        group_by_pattern(records(("a", None)), pattern)


def test_file_splits_take_paths_and_keys_and_report_the_rest():
    samples = records(*[("a", None)] * 4)
    settings = FileSplits(files={"train": "t", "test": "u"})
    listed = {"train": ["0000.jpg", "0001"], "test": ["0002.jpg", "nothing.jpg"]}
    found = assign(samples, settings, seed=0, train="train", listed=listed)
    assert list(found.splits) == ["train", "train", "test", None]
    assert [name for name, _ in found.unknown] == ["nothing.jpg"]
    with pytest.raises(UserError, match="for 'train' and for 'test'"):
        assigned(samples, settings, listed={"train": ["0000.jpg"], "test": ["0000"]})


def test_keys_are_distinct_have_no_dot_and_say_where_they_come_from():
    names = ["a/b.jpg", "a/b.png", "a/c.v2.jpg", "a/c_v2.jpg", "../up.jpg", "s3://bucket/x.jpg", "/root/y.jpg"]
    keys = keys_of(names)
    assert len(set(keys)) == len(names)
    assert not any("." in key for key in keys)
    assert keys[4:] == ["__/up", "bucket/x", "root/y"]
    assert keys_of(["a/b.jpg"]) == ["a/b"]


def test_classes_are_in_the_order_of_numbers_or_letters():
    assert sorted_classes(["10", "9", "1", None]) == ("1", "9", "10")
    assert sorted_classes(["b", "10", "a"]) == ("10", "a", "b")
