"""Storage on S3: what others write is seen at once, hiccups are sat out, and what stays is told with its way out."""

import subprocess
import sys
from itertools import count

import pytest

from dpkd.errors import StorageError, StorageUnavailable
from dpkd.io import storage
from tests.object_store import BUCKET, CREDENTIALS, forget_connections

PLACE = "s3://bucket/a/file"


def test_what_another_process_writes_or_removes_is_seen_at_once(object_store):
    client, folder = object_store.client(), "s3://bucket/seen"
    storage.write_bytes_atomic(f"{folder}/mine", b"x")
    assert storage.list_names(folder) == ["mine"]
    assert not storage.exists(f"{folder}/other")
    client.put_object(Bucket=BUCKET, Key="seen/other", Body=b"y")
    assert storage.exists(f"{folder}/other")
    assert storage.list_names(folder) == ["mine", "other"]
    client.delete_object(Bucket=BUCKET, Key="seen/mine")
    assert not storage.exists(f"{folder}/mine")
    assert storage.list_names(folder) == ["other"]


def test_a_write_that_fails_publishes_nothing(object_store):
    with pytest.raises(ZeroDivisionError), storage.open_atomic("s3://bucket/half") as file:
        assert file.write(b"new") / 0
    assert not storage.exists("s3://bucket/half")


def test_a_large_object_is_published_whole(object_store):
    content = bytes(range(256)) * 500_000  # 128 MB: in several parts
    storage.write_bytes_atomic("s3://bucket/large", content)
    assert storage.sha256("s3://bucket/large") == storage.digest(content)
    storage.remove("s3://bucket/large")


def test_a_store_that_answers_500_and_503_now_and_then_is_asked_again(object_store):
    number = count()
    object_store.fault = lambda *_: {0: 500, 1: 503}.get(next(number) % 5)
    before = object_store.num_failed
    storage.write_bytes_atomic(PLACE, b"content")
    assert storage.read_bytes(PLACE) == b"content"
    assert storage.exists(PLACE)
    assert "file" in storage.list_names("s3://bucket/a")
    assert object_store.num_failed >= before + 2


@pytest.mark.parametrize("verb", [storage.read_bytes, storage.exists, storage.list_names, storage.walk])
def test_a_store_that_always_fails_is_told_and_never_taken_for_an_empty_one(verb, object_store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    object_store.fault = lambda *_: 500
    with pytest.raises(StorageUnavailable, match=r"s3://bucket/a/file: OSError: .*; all retries failed.*run the com"):
        verb(PLACE)


def test_a_store_that_cannot_be_reached_is_told(object_store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageUnavailable, match=r"s3://bucket/a/file: .*Could not connect .*127.0.0.1:9.*AWS_ENDPOI"):
        storage.write_bytes_atomic(PLACE, b"x")


def test_missing_credentials_are_told(object_store, monkeypatch, tmp_path):
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StorageError, match=r"a/file: NoCredentialsError: .*; give credentials .*AWS_ACCESS_KEY_ID"):
        storage.read_bytes(PLACE)


def test_refused_credentials_are_told(object_store):
    object_store.fault = lambda *_: 403
    for verb in (storage.read_bytes, storage.exists, storage.list_names):
        with pytest.raises(StorageError, match=r"PermissionError: .*; give credentials that may read and write there"):
            verb(PLACE)


def test_a_bucket_that_is_missing_is_told_and_not_made(object_store):
    with pytest.raises(StorageError, match=r"s3://buckett/file: there is no such bucket; create it, or cor"):
        storage.write_bytes_atomic("s3://buckett/file", b"x")
    with pytest.raises(StorageError, match="no such bucket"):
        storage.read_bytes("s3://buckett/file")
    assert [bucket["Name"] for bucket in object_store.client().list_buckets()["Buckets"]] == [BUCKET]


def test_a_missing_library_is_told_with_what_to_install():
    code = """
import sys
sys.modules["s3fs"] = None
from dpkd.cli import exit_code
from dpkd.stages.pack import Dataset
sys.exit(exit_code(lambda: Dataset.open("s3://user:secret@bucket/x")))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert told.stderr.startswith("error: s3://***@bucket/x/dataset.json: s3:// cannot be opened (")
    assert 'pip install "dpkd[s3]"' in told.stderr


def test_connections_do_not_outlive_the_environment_they_were_made_in(object_store, monkeypatch):
    assert not storage.exists("s3://bucket/none")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_connections()
    with pytest.raises(StorageUnavailable):
        storage.exists("s3://bucket/none")
