"""User names, passwords and signatures in URLs, and the environment, reach no file, line or error of a run."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpkd.data.images import BrokenImage
from dpkd.errors import UserError, WorkerFailed, printable, without_secrets
from dpkd.log import EventLog, Progress, logger
from dpkd.models.backbone import create_timm_model
from dpkd.models.network import build_network
from dpkd.models.saved import load_network, save_network
from dpkd.models.settings import ModelSettings, NetworkSpec
from dpkd.models.weights import load_weights
from dpkd.report.quarantine import Quarantine
from dpkd.stages.export import write_timm_folder
from tests.data.packing import image_bytes
from tests.object_store import ObjectStore
from tests.runs import VIT, Command, tiny

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


def test_errors_lines_events_and_quarantine_mask_what_they_are_given(tmp_path, capsys):
    for kind in (UserError, BrokenImage, WorkerFailed):
        assert not any(secret in f"{kind(URL)!r} {kind(URL)}" for secret in SECRETS)
    logger.info(f"{URL} \x1b[31m \udcff")
    with Progress(URL, 1):
        pass
    EventLog(tmp_path / "events.jsonl").write("train", place=URL)
    assert json.loads((tmp_path / "events.jsonl").read_text())["place"] == "s3://***@bucket/a/b.jpg?***"
    Quarantine(tmp_path / "quarantine.jsonl", limit=1).add("pack", URL, f"not found: {URL}")
    written = "".join(path.read_text() for path in tmp_path.iterdir()) + capsys.readouterr().out
    assert not any(secret in written for secret in SECRETS)
    assert "\\x1b[31m \\udcff" in written
    assert "\x1b" not in written


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
            "path": f"{server}/t.jsonl?X-Amz-Signature={SIGNATURE}",
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
    assert "http://***@127.0.0.1" in run.folder.path.joinpath("settings.yaml").read_text()


def secrets_in(text: str) -> list[str]:
    """The secrets that a text holds."""
    return [secret for secret in SECRETS if secret in text]


def small_spec(arguments: dict[str, Any]) -> NetworkSpec:
    """A small ViT of two classes."""
    model = ModelSettings(name=VIT["name"], arguments=arguments)
    return NetworkSpec(model=model, classes=("a", "b"), image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_a_saved_and_an_exported_network_do_not_hold_the_url_of_their_first_weights(tmp_path):
    spec = small_spec(VIT["arguments"] | {"pretrained_cfg_overlay": {"url": URL}})
    save_network(tmp_path, spec, build_network(spec, seed=0).state_dict())
    assert not secrets_in((tmp_path / "network.json").read_text())
    assert "s3://***@bucket/a/b.jpg?***" in (tmp_path / "network.json").read_text()
    _, network = load_network(tmp_path)
    write_timm_folder(tmp_path, network)
    assert not secrets_in((tmp_path / "config.json").read_text())


def test_weights_are_downloaded_without_a_word_of_the_signature(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = build_network(small_spec(VIT["arguments"]), seed=0).backbone.timm.state_dict()
    torch.save(weights, tmp_path / "served" / "w.pth")
    url = f"{server.replace(f'{USER}:{PASSWORD}@', '')}/w.pth?X-Amz-Signature={SIGNATURE}"
    overlay = {"url": url, "hf_hub_id": None, "num_classes": 2}
    model = ModelSettings(
        name=VIT["name"], arguments=VIT["arguments"] | {"pretrained_cfg_overlay": overlay}, pretrained=True
    )
    made = create_timm_model(model, num_classes=2, image_size=32)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in made.state_dict().items())
    printed = capfd.readouterr()
    assert "w.pth?***" in printed.out
    assert not secrets_in(printed.out + printed.err)


def test_a_url_in_the_place_of_a_path_of_weights_is_refused_without_its_secrets():
    with pytest.raises(UserError, match="is no file") as caught:
        load_weights(torch.nn.Linear(1, 1), URL)
    assert not secrets_in(str(caught.value))


def write_signed_table(server: str, folder: Path, *, splits: list[str]) -> dict[str, str]:
    """Writes images of three classes and a table of their signed URLs; returns the settings of that source."""
    rows = []
    for i, split in enumerate(splits):
        (folder / f"{i}.png").write_bytes(image_bytes(i, image_format="PNG"))
        rows.append({"path": f"{server}/{i}.png?X-Amz-Signature={SIGNATURE}{i}", "label": f"c{i % 3}", "split": split})
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"label_column": "label", "split_column": "split"}
    return {"kind": "table", "path": f"{server}/t.jsonl?X-Amz-Signature={SIGNATURE}"} | columns


def small_run(folder: Path, *, source: dict[str, str]) -> dict[str, Any]:
    """Settings of all stages with one student, shards and checkpoints on S3, and secrets in a model's arguments."""
    tree = tiny(folder, source=None, shards=None)
    tree["run"]["checkpoints"] = "s3://bucket/signed/checkpoints"
    tree["data"] |= {"source": source, "shards": "s3://bucket/signed/shards"}
    tree["prepare"] = {"priors": [{"kind": "edge"}, {"kind": "saliency"}]}
    tree["evaluate"] = {"episodes": {"way": 2, "shots": [1], "queries": 2, "episodes": 5}, "episodes_while_training": 5}
    for stage in ("teach", "distill"):
        tree[stage]["training"] |= {"batch_size": 8}
    arguments = VIT["arguments"] | {"pretrained_cfg_overlay": {"url": URL}}  # where timm would download weights from
    tree["distill"]["students"] = {"vit": {"model": VIT | {"arguments": arguments}, "losses": [{"kind": "supervised"}]}}
    return tree


@pytest.mark.slow
def test_all_stages_and_a_refusing_store_leave_no_secret_anywhere(
    server: str, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # copies of shards
    source = write_signed_table(server, tmp_path / "served", splits=["base"] * 12 + ["val"] * 12 + ["novel"] * 12)
    tree = small_run(tmp_path / "runs" / "signed", source=source)

    object_store.fault = lambda method, path: 403 if method == "PUT" and "/teach/step-00000004-" in path else None
    refused = Command(tree)
    assert refused.wait() == 2, refused.output
    assert "s3://bucket/signed/checkpoints/teach" in refused.output
    kept = object_store.objects("signed/")
    assert any(name.startswith("checkpoints/teach/step-00000002-") for name in kept)

    object_store.fault = None
    whole = Command(tree)
    assert whole.wait() == 0, whole.output
    written = {path: path.read_bytes() for path in whole.folder.path.rglob("*") if path.is_file()}
    names = {path.name for path in written}
    assert names >= {"settings.yaml", "stages.json", "events.jsonl", "goodput.json", "evaluation.json", "summary.md"}
    assert names >= {"network.json", "config.json", "README.md"}
    assert any("tfevents" in name for name in names)
    found = written | kept | object_store.objects("signed/") | {"output": whole.output.encode()}
    leaks = {name: secret for name, content in found.items() for secret in SECRETS if secret.encode() in content}
    assert not leaks
