"""Settings hold no passwords and signatures; those of URLs in a table reach no file, line or error of a run."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpkd.data.image_headers import BrokenImage
from dpkd.errors import UserError, printable, refuse_secrets, without_secrets
from dpkd.log import Progress, logger
from dpkd.report.quarantine import Quarantine
from dpkd.settings import parse_settings
from tests.data.packing import image_bytes
from tests.runs import Command, tiny

USER, PASSWORD, SIGNATURE, KEY = "somebody", "pa55w0rd", "51gnatur3", "3nv1r0nment"
SECRETS = (USER, PASSWORD, SIGNATURE, KEY)
URL = f"s3://{USER}:{PASSWORD}@bucket/a/b.jpg?X-Amz-Signature={SIGNATURE}&x=1"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (URL, "s3://***@bucket/a/b.jpg?***"),
        (f"cannot read '{URL}': gone", "cannot read 's3://***@bucket/a/b.jpg?***': gone"),
        (f"{USER}@example.org", f"{USER}@example.org"),
        ("s3://bucket/train-{00..09}.tar", "s3://bucket/train-{00..09}.tar"),
        ("s3://bucket/train-0?.tar", "s3://bucket/train-0?.tar"),
        ("https://host/a@2x.png", "https://host/a@2x.png"),
        (f"simplecache::https://{PASSWORD}@host:80/x?sig={SIGNATURE}", "simplecache::https://***@host:80/x?***"),
        (str(Path(f"https://{USER}:{PASSWORD}@host/x.pt?sig={SIGNATURE}")), "https:/***@host/x.pt?***"),
        (f"a https://{USER}:p@ss@host/ b http://h/?t={KEY} c", "a https://***@host/ b http://h/?*** c"),
    ],
)
def test_secrets_of_urls_are_masked_and_nothing_else(text, shown):
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown


WORDS = st.text("abcdefghij%-._~0123456789", min_size=1, max_size=12)


@given(st.sampled_from(["s3", "https", "abfs"]), st.lists(WORDS, min_size=5, max_size=5))
def test_no_user_password_or_query_survives(scheme, words):
    user, password, host, path, value = words
    shown = without_secrets(f"{scheme}://<{user}>:<{password}>@{host}/{path}?sig=<{value}>")
    assert shown == f"{scheme}://***@{host}/{path}?***"


@given(st.text())
def test_what_is_printed_has_an_encoding_and_steers_no_terminal(text):
    shown = printable(text)
    shown.encode()
    assert all(each.isprintable() or each in "\n\t\u00a0" for each in shown)


@pytest.mark.nightly  # pytest keeps the lines of a log, and processes of pytest-xdist cannot exchange half a character
def test_lines_broken_images_and_quarantine_mask_what_they_are_given(tmp_path, capsys):
    assert not any(secret in f"{BrokenImage(URL)!r} {BrokenImage(URL)}" for secret in SECRETS)
    logger.info(f"{URL} \x1b[31m \udcff")
    with Progress(URL, 1):
        pass
    Quarantine(tmp_path / "quarantine.jsonl", limit=1).add("pack", URL, f"not found: {URL}")
    written = "".join(path.read_text() for path in tmp_path.iterdir()) + capsys.readouterr().out
    assert not any(secret in written for secret in SECRETS)
    assert "\\x1b[31m \\udcff" in written
    assert "\x1b" not in written


@pytest.mark.parametrize(
    "url",
    [
        URL,
        f"s3://{USER}:{PASSWORD}@bucket/shards",
        f"https://{PASSWORD}@host/x.csv",
        f"az://container/shards?sig={SIGNATURE}",
        f"https://host/t.csv?x=1&X-Amz-Signature={SIGNATURE}",
        f"simplecache::https://host/t.csv?access_token={SIGNATURE}",
    ],
)
def test_settings_with_a_secret_in_a_url_are_refused_by_their_key(url, tmp_path):
    tree = tiny(tmp_path / "run", source=None)
    tree["data"]["source"] = {"kind": "table", "path": url, "label_column": "label"}
    with pytest.raises(UserError, match=r"^data\.source\.path=.*environment variables") as caught:
        parse_settings(tree, origin="x.yaml")
    assert not any(secret in str(caught.value) for secret in SECRETS)
    with pytest.raises(UserError, match=r"^a\.1\.b="):
        refuse_secrets({"a": [0, {"b": url}]})


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/train-{00..09}.tar",
        "s3://bucket/y-?/x=1/*.tar",
        "abfs://container@account.dfs.core.windows.net/shards",
        "https://host:80/a@2x.png?size=2",
        "a password=1",
        f"{USER}@example.org",
    ],
)
def test_urls_without_secrets_are_settings(text, tmp_path):
    tree = tiny(tmp_path / "run", source=None)
    tree["data"]["source"] = {"kind": "table", "path": text, "label_column": "label"}
    source = parse_settings(tree, origin="x.yaml").data.source
    assert source is not None
    assert source.path == text


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    """A web server on loopback with a folder of its own; its URL carries a user and a password."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://{USER}:{PASSWORD}@127.0.0.1:{web.server_port}"
        web.shutdown()


@pytest.mark.nightly
def test_a_run_on_signed_urls_leaves_no_secret_anywhere(server, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    splits = ["base"] * 6 + ["val"] * 3 + ["novel"] * 3
    rows = [
        {"path": f"{server}/{i}.png?X-Amz-Signature={SIGNATURE}{i}", "label": f"c{i % 3}", "split": split}
        for i, split in enumerate(splits)
    ]
    for i in range(len(rows) - 1):  # the last is not there
        (tmp_path / "served" / f"{i}.png").write_bytes(image_bytes(i, image_format="PNG"))
    rows += [{"path": f"{server}/0.png?id=other{SIGNATURE}", "label": "c0", "split": "base"}]
    (tmp_path / "served" / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = tiny(tmp_path / "runs" / "signed", source=None)
    tree["data"] |= {
        "source": {
            "kind": "table",
            "path": str(tmp_path / "served" / "t.jsonl"),
            "label_column": "label",
            "split_column": "split",
        },
        "bad_limit": 0.5,
    }
    run = Command(tree, "--stages", "pack")
    assert run.wait() == 0, run.output
    quarantined = [json.loads(line) for line in run.folder.quarantine.read_text().splitlines()]
    assert len(quarantined) == 1
    again = Command(tree | {"data": tree["data"] | {"bad_limit": 0.0}}, "--stages", "pack", "run.seed=1")
    assert again.wait() == 2, again.output
    written = [path for path in run.folder.path.rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"settings.yaml", "versions.json", "stages.json", "dataset.json"}
    for path in written:
        content = path.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], path
    assert not [secret for secret in SECRETS if secret in run.output + again.output], run.output + again.output
    assert "http://***@127.0.0.1" in run.folder.quarantine.read_text()
