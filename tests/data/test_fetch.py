"""The mirror: what a hub serves arrives whole and once, and everything that can go wrong is one clear line."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from helpers.hub_server import Hub, git_blob, serving, sha256
from huggingface_hub import constants
from typer.testing import CliRunner

from f2llm.config import SHAPE, load_config
from f2llm.data.fetch import adopt, fetch, plan_all, plan_data_sets, plan_fetch, plan_models
from f2llm.data.mirror import Mirror
from f2llm.embedded.backbone import new_model
from f2llm.model import Embedder
from f2llm.pipeline import cli
from f2llm.pipeline.models import copy_backbone, copy_teacher
from f2llm.store.progress import Progress

REPO, SHA, OLD = "someone/tuples", "a" * 40, "b" * 40
FILES = {
    "README.md": b"# Tuples\n",
    "data/one.parquet": Random(1).randbytes(300_000),
    "data/two #1 é.parquet": Random(2).randbytes(200_000),
    "data/deep/three.jsonl": b'{"query": "q"}\n' * 50,
    "empty.txt": b"",
}
COMMAND = "f2llm fetch --released"


@pytest.fixture
def hub(monkeypatch):
    """A hub; the library, which reads these settings at its import only, may use the network for one test."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(Hub(REPO, SHA, dict(FILES))) as hub:
        yield hub


def plan(hub, patterns=("*",), revision="main", repo=REPO):
    return plan_fetch(repo, list(patterns), revision, endpoint=hub.url)


def in_folder(folder):
    """{name: content} of the files that are not hidden."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: content for name, content in found.items() if not name.startswith(".")}


def forget(hub):
    """Count requests and downloads from here on."""
    hub.requests.clear()
    hub.downloads.clear()


def manifest_of(mirror):
    return json.loads((mirror / "manifest.json").read_text())


# What arrives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", [None, "main", SHA])
def test_a_plan_is_the_hubs_listing_at_a_commit(hub, revision):
    made = plan(hub, revision=revision)
    assert made.revision == SHA and {file.name: file.bytes for file in made.files} == {
        name: len(content) for name, content in FILES.items()
    }
    assert made.bytes == sum(map(len, FILES.values()))
    checksums = {file.name: file.checksum for file in made.files}
    assert checksums["data/one.parquet"] == sha256(FILES["data/one.parquet"])
    assert checksums["README.md"] == git_blob(FILES["README.md"])


def test_a_mirror_holds_the_hubs_content_and_its_hashes(hub, tmp_path):
    fetch(plan(hub), tmp_path)
    content = in_folder(tmp_path)
    assert content.pop("manifest.json") and content == {f"{REPO}/{name}": data for name, data in FILES.items()}
    facts = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in FILES.items()}
    assert manifest_of(tmp_path) == {REPO: {"revision": SHA, "files": facts, "listing": sorted(FILES)}}
    assert {path.name for path in tmp_path.rglob(".*")} == {".lock"}, "nothing of the library's stays"
    mirror = Mirror(tmp_path)
    assert mirror.verify() == [] and mirror.revision(REPO) == SHA
    assert mirror.sha256(REPO, "README.md") == sha256(FILES["README.md"])


def test_only_matching_files_are_fetched_and_only_once(hub, tmp_path):
    fetch(plan(hub, ["data/*.parquet"]), tmp_path)
    assert {name for name, _ in hub.downloads} == {"data/one.parquet", "data/two #1 é.parquet"}
    forget(hub)
    fetch(plan(hub, ["data/one.parquet", "README.md"]), tmp_path)
    assert hub.downloads == [("README.md", 0)], "vacuous or fetched again"
    mirror = Mirror(tmp_path)
    assert len(mirror.require(REPO, ["*.parquet", "README.md"], command=COMMAND)) == 3 and mirror.verify() == []
    with pytest.raises(ValueError, match=r"tuples: data/deep/three.jsonl is missing; remedy"):
        mirror.require(REPO, ["data/*"], command=COMMAND)  # a part of what is selected would go unseen


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(plan(hub, ["data/one.parquet"]), tmp_path)
    seen = {path.split("/")[1]: has_token for path, has_token in hub.requests}
    assert seen == {"api": True, "datasets": True, "cdn": False}


def test_the_line_of_a_download_counts_bytes_of_all_repositories_without_those_that_are_there(hub, tmp_path):
    progress = Progress("fetch", "bytes", 2 * plan(hub).bytes)
    fetch(plan(hub, ["data/one.parquet"]), tmp_path)
    fetch(plan(hub), tmp_path, progress)
    came = plan(hub).bytes - len(FILES["data/one.parquet"])
    assert (progress.done, progress.total) == (came, came + plan(hub).bytes)
    fetch(plan(hub), tmp_path, progress)
    assert (progress.done, progress.total) == (came, came), "nothing is left"


# Interruptions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_a_dropped_connection_is_taken_up_also_by_a_hub_without_ranges(hub, tmp_path, monkeypatch, ranges):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.drop["data/one.parquet"], hub.ranges = 123_456, ranges
    fetch(plan(hub, ["data/one.parquet"]), tmp_path)
    (start, again) = hub.downloads
    assert start == ("data/one.parquet", 0) and (0 < again[1] <= 123_456 if ranges else again[1] == 0)
    assert (tmp_path / REPO / "data/one.parquet").read_bytes() == FILES["data/one.parquet"] and not hub.drop
    assert Mirror(tmp_path).verify() == []


def test_a_killed_process_costs_the_files_in_flight_and_two_do_not_share_a_mirror(hub, tmp_path):
    small = {f"{number}.txt": b"%d" % number for number in range(20)}
    hub.files = {"a.parquet": Random(3).randbytes(2**20), "b.parquet": Random(4).randbytes(2**20)} | small
    hub.stall = {"a.parquet": 2**19, "b.parquet": 2**19}
    mirror = tmp_path / "mirror"
    script = f"from f2llm.data.fetch import *; fetch(plan_fetch({REPO!r}, ['*'], None), {str(mirror)!r})"
    setting = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | setting, cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 60
        while len(list(mirror.rglob("*.txt"))) < len(small) or len(list(mirror.rglob("*.incomplete"))) < 2:
            assert time.monotonic() < deadline and process.poll() is None, "the downloads did not start"
            time.sleep(0.05)
        with pytest.raises(RuntimeError, match=r"another fetch works in .*; remedy: wait"):
            fetch(plan(hub), mirror)
    finally:
        process.kill()
        process.wait()
    with pytest.raises(ValueError, match=r"a.parquet is missing, b.parquet is missing; remedy: .*--released"):
        Mirror(mirror).require(REPO, ["*.parquet"], command=COMMAND)
    assert list(mirror.rglob("*.incomplete")), "vacuous: nothing was left behind"
    hub.stall.clear()
    forget(hub)
    fetch(plan(hub), mirror)
    assert sorted(hub.downloads) == [("a.parquet", 0), ("b.parquet", 0)], "whole files are not fetched again"
    assert in_folder(mirror / REPO) == hub.files and not list(mirror.rglob("*.incomplete"))
    assert len(Mirror(mirror).require(REPO, ["*"], command=COMMAND)) == 22 and Mirror(mirror).verify() == []


def test_files_that_came_before_an_error_of_the_hub_are_kept(hub, tmp_path):
    hub.status["data/deep/three.jsonl"] = 503
    with pytest.raises(RuntimeError, match=r"answers 503 for someone/tuples; remedy: repeat .* whole are kept"):
        fetch(plan(hub), tmp_path)
    came = in_folder(tmp_path / REPO)
    assert came and came == {name: FILES[name] for name in came} and "data/deep/three.jsonl" not in came
    with pytest.raises(ValueError, match=r"data/deep/three.jsonl is missing"):
        Mirror(tmp_path).require(REPO, ["data/deep/*"], command=COMMAND)
    hub.status.clear()
    forget(hub)
    fetch(plan(hub), tmp_path)
    assert sorted(hub.downloads) == [(name, 0) for name in sorted(FILES.keys() - came.keys())]
    assert Mirror(tmp_path).verify() == []


def test_a_process_that_died_before_the_manifest_was_written_costs_a_hash_only(hub, tmp_path):
    fetch(plan(hub), tmp_path)
    before = manifest_of(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / REPO / "README.md").write_bytes(FILES["README.md"][::-1])  # same size, other content
    forget(hub)
    fetch(plan(hub), tmp_path)
    assert hub.downloads == [("README.md", 0)] and manifest_of(tmp_path) == before


# What is not what it should be --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "data/one.parquet"])
def test_corrupt_content_is_refused_and_removed(hub, tmp_path, name):
    made = plan(hub, [name])
    hub.files[name] = bytes([FILES[name][0] ^ 1]) + FILES[name][1:]
    with pytest.raises(
        RuntimeError, match=rf"{name}: what came .* is not what the hub lists .*removed. remedy: repeat"
    ):
        fetch(made, tmp_path)
    assert in_folder(tmp_path).keys() == {"manifest.json"}
    hub.files[name] = FILES[name]
    fetch(made, tmp_path)
    assert (tmp_path / REPO / name).read_bytes() == FILES[name]


def test_all_files_that_are_not_what_the_hub_lists_are_named_and_the_others_are_kept(hub, tmp_path):
    made = plan(hub)
    hub.files |= {name: b"x" * len(FILES[name]) for name in ("README.md", "data/one.parquet")}
    with pytest.raises(RuntimeError, match=r"tuples/README.md: what came .*, someone/tuples/data/one.parquet: what"):
        fetch(made, tmp_path)
    kept = FILES.keys() - {"README.md", "data/one.parquet"}
    assert in_folder(tmp_path / REPO).keys() == kept == manifest_of(tmp_path)[REPO]["files"].keys()
    hub.files = dict(FILES)
    forget(hub)
    fetch(made, tmp_path)
    assert sorted(hub.downloads) == [("README.md", 0), ("data/one.parquet", 0)] and Mirror(tmp_path).verify() == []


@pytest.mark.parametrize("name", ["README.md", "data/one.parquet"])
def test_a_file_of_another_size_than_the_hub_announces_is_refused(hub, tmp_path, name):
    hub.announced[name] = len(FILES[name]) + 1
    with pytest.raises(RuntimeError, match=r"someone/tuples from .*should be of size.*remedy: repeat") as error:
        fetch(plan(hub, [name]), tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / REPO / name).exists()


def test_a_wrong_file_is_not_kept_when_the_hub_does_not_answer(hub, mirror):
    (mirror / REPO / "README.md").unlink()
    (mirror / REPO / "README.md").write_bytes(b"# Tup")
    made = plan(hub)
    hub.answer[f"/tree/{SHA}"] = (403, {}, b"")  # the library then takes what is in the folder
    with pytest.raises(RuntimeError, match=r"README.md: what came \(nothing\) is not .*remedy: repeat"):
        fetch(made, mirror)
    hub.answer.clear()
    fetch(made, mirror)
    assert hub.downloads == [("README.md", 0)] and Mirror(mirror).verify() == []


def test_names_that_read_as_patterns_are_names(hub, tmp_path):
    hub.files = {"data/[x]?.txt": b"a", "data/x1.txt": b"b", "data/*.txt": b"c"}
    fetch(plan(hub, ["data/[x]?.txt"]), tmp_path / "one")
    assert in_folder(tmp_path / "one" / REPO).keys() == {"data/[x]?.txt", "data/x1.txt"}, "here it is a pattern, too"
    made = plan(hub)
    fetch(replace(made, files=[file for file in made.files if "[" in file.name]), tmp_path / "two")
    assert in_folder(tmp_path / "two" / REPO) == {"data/[x]?.txt": b"a"}


@pytest.mark.parametrize("content", [b"# Tup", b"# Tuples and more\n"])
def test_a_file_of_another_size_than_listed_is_refused(hub, tmp_path, content):
    made = plan(hub, ["README.md"])
    hub.files["README.md"] = content
    with pytest.raises(RuntimeError, match=rf"README.md: what came \({len(content)} bytes\) is not .*\(9 bytes"):
        fetch(made, tmp_path)
    assert not (tmp_path / REPO / "README.md").exists()


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "a\\..\\evil.txt", "C:evil.txt"])
def test_names_that_leave_the_folder_are_refused(hub, tmp_path, name):
    hub.files[name] = b"evil"
    with pytest.raises(ValueError, match=r"the name .*evil.txt' could leave .*remedy"):
        plan(hub)
    made = plan(hub, ["README.md"])
    with pytest.raises(ValueError, match="could leave"):
        fetch(replace(made, files=[replace(made.files[0], name=name)]), tmp_path / "mirror")
    assert hub.downloads == [] and not list(tmp_path.rglob("evil*"))
    fetch(made, tmp_path / "mirror")


def test_revisions_are_not_mixed(hub, tmp_path):
    made = plan(hub, ["README.md"])
    fetch(made, tmp_path)
    forget(hub)
    with pytest.raises(ValueError, match=rf"holds revision {SHA}, but {OLD} was asked.*remedy: another mirror.*remove"):
        fetch(replace(made, revision=OLD), tmp_path)
    assert hub.requests == [] and Mirror(tmp_path).verify() == []
    with pytest.raises(ValueError, match=rf"at revision {SHA}, but {OLD} is asked for; remedy: .*{COMMAND}"):
        Mirror(tmp_path).require(REPO, ["README.md"], command=COMMAND, revision=OLD)
    shutil.rmtree(tmp_path / REPO)
    adopt_some(tmp_path, OLD)
    assert Mirror(tmp_path).revision(REPO) == OLD, "the remedy must work"


# What the hub and the network do ------------------------------------------------------------------


@pytest.mark.parametrize("status", [404, 401])
def test_an_unknown_or_private_repository_is_one_error(hub, status):
    hub.answer["/api/datasets/no/such"] = (status, {"X-Error-Code": "RepoNotFound"}, b"")
    with pytest.raises(
        ValueError, match=r"has no dataset 'no/such', or it is private; remedy: .*hf auth login.*HF_TOKEN"
    ):
        plan(hub, repo="no/such", revision=None)


def test_all_repositories_that_cannot_be_fetched_are_named_at_once(hub):
    needed = [(REPO, ["README.md"], SHA), (REPO, ["*.csv"], "main"), ("someone/else", ["*"], None)]
    with pytest.raises(ValueError, match=r"2 of 3 repositories cannot be fetched, nothing was:\n .*csv.*\n .*else"):
        plan_all(needed, endpoint=hub.url)
    (found,) = plan_all(needed[:1], endpoint=hub.url)
    assert found == plan(hub, ["README.md"], SHA)
    with pytest.raises(ValueError, match=r"^someone/tuples at .*no file matches"):
        plan_all(needed[1:2], endpoint=hub.url)


def test_what_is_wrong_with_a_question_is_named(hub):
    with pytest.raises(ValueError, match=r"someone/tuples has no revision 'v9'; remedy"):
        plan(hub, revision="v9")
    with pytest.raises(ValueError, match=r"no file matches '\*\.csv'; there are 5 files: README.md, data/.*remedy"):
        plan(hub, ["*.parquet", "*.csv"])
    with pytest.raises(ValueError, match=r"Repo id must"):
        plan(hub, repo="../../etc")


def test_a_gated_set_says_where_its_terms_are(hub, tmp_path):
    hub.answer["README.md"] = (401, {"X-Error-Code": "GatedRepo"}, b"")
    page = f"{hub.url}/datasets/{REPO}"
    with pytest.raises(
        ValueError, match=rf"is gated; remedy: accept its terms at {page}, then `hf auth login`.*HF_TOKEN"
    ):
        fetch(plan(hub), tmp_path)


@pytest.mark.parametrize(
    "answer, message",
    [
        ((401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""), "answers 401.*hf auth login"),
        ((403, {}, b""), "answers 403 .*remedy: .*private or gated, `hf auth login`"),
        ((404, {}, b""), "answers 404 .*remedy: correct the id"),
        ((500, {}, b""), "answers 500 .*remedy: repeat the command later"),
        ((429, {}, b""), "answers 429 .*remedy: repeat the command later"),
        ((200, {"Content-Type": "text/html"}, b"<html>Log in to this WLAN"), "not answer as a hub.*remedy: .*proxy"),
    ],
)
def test_what_the_hub_answers_otherwise_is_one_line(hub, answer, message):
    hub.answer["/revision/main"] = answer
    with pytest.raises(RuntimeError, match=message) as error:
        plan(hub)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "answer, message",
    [
        ((403, {}, b""), "answers 403 for someone/tuples; remedy: .*private or gated, `hf auth login`"),
        ((404, {"X-Error-Code": "EntryNotFound"}, b""), "answers 404 .*remedy: correct the id"),
        ((401, {}, b""), "answers 401.*hf auth login"),
        ((200, {}, b"<html>Log in to this WLAN"), "not answer as a hub.*remedy: .*proxy"),
    ],
)
def test_what_the_hub_answers_when_a_file_is_asked_for_is_one_line(hub, tmp_path, answer, message):
    made = plan(hub)
    hub.answer["/README.md"] = answer
    with pytest.raises(RuntimeError, match=message) as error:
        fetch(made, tmp_path)
    assert "\n" not in str(error.value)


def test_a_hub_that_is_gone_in_the_middle_is_one_line(hub, tmp_path, monkeypatch):
    made = replace(plan(hub), endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits between its attempts
    with pytest.raises(RuntimeError, match=r"no answer from http://127.0.0.1:9 .*ConnectError.*remedy: check network"):
        fetch(made, tmp_path)


def test_a_slow_hub_and_none_at_all_are_told_with_the_settings(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.answer["/revision/main"] = (200, {"Content-Length": "10"}, b"")  # says ten bytes, sends none
    settings = "remedy: check network and proxy.*HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT"
    with pytest.raises(RuntimeError, match=rf"no answer from {hub.url} .*Timeout.*{settings}"):
        plan(hub)
    with pytest.raises(RuntimeError, match=rf"no answer from http://127.0.0.1:9 .*ConnectError.*{settings}"):
        plan_fetch(REPO, ["*"], None, endpoint="http://127.0.0.1:9")


def test_the_switch_against_the_network_is_named(hub, tmp_path, monkeypatch):
    made = plan(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget(hub)
    for attempt in (lambda: plan(hub), lambda: fetch(made, tmp_path)):
        with pytest.raises(RuntimeError, match=r"HF_HUB_OFFLINE.*remedy: put HF_HUB_OFFLINE=0"):
            attempt()
    assert hub.requests == []


# Disks --------------------------------------------------------------------------------------------


def test_too_little_space_is_known_before_the_download(hub, tmp_path):
    hub.listed["data/one.parquet"] = 10**18
    with pytest.raises(RuntimeError, match=r"931322574.6 GiB are to be fetched, but only [\d.]+ GiB .*remedy: free"):
        fetch(plan(hub), tmp_path)
    assert hub.downloads == []


def test_a_disk_that_takes_no_more_is_one_error_and_the_next_call_completes(hub, tmp_path):
    _, hard = limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RuntimeError, match=rf"cannot write {tmp_path}: File too large.*remedy: free disk space"):
            fetch(plan(hub), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    came = in_folder(tmp_path / REPO)
    assert came == {name: FILES[name] for name in came} and "data/one.parquet" not in came
    forget(hub)
    fetch(plan(hub), tmp_path)
    assert {name for name, _ in hub.downloads} == FILES.keys() - came.keys() and Mirror(tmp_path).verify() == []


def test_a_mirror_that_cannot_be_a_folder_is_one_error(hub, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"cannot write .*file/mirror: .*remedy"):
        fetch(plan(hub), tmp_path / "file" / "mirror")


# Reading ------------------------------------------------------------------------------------------


def adopt_some(mirror, revision=SHA):
    folder = mirror.parent / f"{mirror.name} some"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "hidden").touch()
    adopt(mirror, REPO, folder, revision)
    return folder


@pytest.fixture
def mirror(tmp_path):
    adopt_some(tmp_path / "mirror")
    return tmp_path / "mirror"


def test_an_adopted_folder_equals_a_fetched_one(hub, mirror, tmp_path):
    fetch(plan(hub), tmp_path / "fetched")
    (manifest,) = manifest_of(tmp_path / "fetched").values()
    assert manifest.pop("listing") and manifest_of(mirror) == {REPO: manifest}
    for name, content in FILES.items():
        assert (mirror / REPO / name).read_bytes() == content == (tmp_path / "fetched" / REPO / name).read_bytes()
    forget(hub)
    fetch(plan(hub), mirror)
    assert hub.downloads == []


def test_adopting_links_repeats_and_follows_links(mirror, tmp_path):
    original = tmp_path / "mirror some" / "README.md"
    assert original.samefile(mirror / REPO / "README.md")
    adopt(mirror, REPO, mirror / REPO, SHA)
    assert Mirror(mirror).verify() == [] and len(manifest_of(mirror)[REPO]["files"]) == len(FILES)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.txt").symlink_to(original)
    adopt(mirror, "other", tmp_path / "linked", "local")
    assert not (mirror / "other" / "a.txt").is_symlink()
    assert (mirror / "other" / "a.txt").read_bytes() == FILES["README.md"]
    with pytest.raises(ValueError, match=r"nowhere is no folder with files; remedy"):
        adopt(mirror, REPO, tmp_path / "nowhere", SHA)


def test_an_adopted_file_that_is_not_the_hubs_is_replaced_in_the_mirror_only(hub, tmp_path):
    (tmp_path / "other").mkdir()
    original, name = tmp_path / "other" / "one.parquet", "one.parquet"
    hub.files = {name: FILES["data/one.parquet"]}
    original.write_bytes(hub.files[name][::-1])
    adopt(tmp_path / "mirror", REPO, tmp_path / "other", SHA)
    fetch(plan(hub), tmp_path / "mirror")
    assert (tmp_path / "mirror" / REPO / name).read_bytes() == hub.files[name] == original.read_bytes()[::-1]
    assert Mirror(tmp_path / "mirror").verify() == []


def test_a_file_that_was_put_right_by_hand_is_taken_up(hub, tmp_path):
    (tmp_path / "other").mkdir()
    for name in ("README.md", "one.parquet"):
        (tmp_path / "other" / name).write_bytes(b"wrong")
    hub.files = {"README.md": b"right!", "one.parquet": b"right"}
    adopt(tmp_path / "mirror", REPO, tmp_path / "other", SHA)
    for name, content in hub.files.items():
        (tmp_path / "mirror" / REPO / name).write_bytes(content)
    assert len(Mirror(tmp_path / "mirror").verify()) == 2
    fetch(plan(hub), tmp_path / "mirror")
    assert hub.downloads == [] and Mirror(tmp_path / "mirror").verify() == []


def test_a_mirror_works_where_it_is_copied(mirror, tmp_path):
    shutil.copytree(mirror, tmp_path / "elsewhere")
    shutil.rmtree(mirror)
    copied = Mirror(tmp_path / "elsewhere")
    paths = copied.require(REPO, ["data/*.parquet", "README.md", "data/one.parquet"], command=COMMAND, revision=SHA)
    names = ["README.md", "data/one.parquet", "data/two #1 é.parquet"]
    assert paths == [tmp_path / "elsewhere" / REPO / name for name in names]
    assert [path.read_bytes() for path in paths] == [FILES[name] for name in names] and copied.verify() == []


def test_all_that_is_missing_is_named_at_once_with_the_command(mirror):
    (mirror / REPO / "README.md").unlink()
    with pytest.raises(ValueError) as error:
        Mirror(mirror).require(REPO, ["*.md", "a.csv", "*.arrow", "b.csv", "*.parquet"], command=COMMAND)
    assert str(error.value) == (
        f"mirror {mirror}, {REPO}: README.md is missing, a.csv is missing, *.arrow is missing and 1 more; "
        f"remedy: fetch with: {COMMAND}"
    )
    for path, repo in ((mirror, "no/such"), (mirror / "nowhere", REPO)):
        with pytest.raises(ValueError, match=rf"{repo}: \* is missing; remedy: fetch with: {COMMAND}"):
            Mirror(path).require(repo, ["*"], command=COMMAND)
        with pytest.raises(ValueError, match=rf"has no {repo}, it holds .*; remedy"):
            Mirror(path).revision(repo)
    with pytest.raises(ValueError, match=r"a.csv is missing; remedy"):
        Mirror(mirror).sha256(REPO, "a.csv")


def test_a_truncated_file_is_found_and_fetched_again(hub, mirror):
    path = mirror / REPO / "data" / "one.parquet"
    path.unlink()
    path.write_bytes(FILES["data/one.parquet"][:-1])
    with pytest.raises(
        ValueError, match=r"one.parquet has 299999 bytes, not 300000: truncated or changed, fetch again"
    ):
        Mirror(mirror).require(REPO, ["*"], command=COMMAND)
    assert len(Mirror(mirror).verify()) == 1
    fetch(plan(hub), mirror)
    assert hub.downloads == [("data/one.parquet", 0)] and Mirror(mirror).verify() == []


def test_verify_reads_every_byte(mirror):
    content = FILES["data/one.parquet"]
    (mirror / REPO / "data" / "one.parquet").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (mirror / REPO / "empty.txt").unlink()
    assert Mirror(mirror).require(REPO, ["*.parquet"], command=COMMAND), "sizes alone do not tell"
    changed, missing = Mirror(mirror).verify()
    assert "one.parquet was changed: remove" in changed and "empty.txt is missing" in missing


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"revis',
        "[]",
        '{"a": 1}',
        '{"a": {"files": {}}}',
        '{"a": {"revision": "r", "files": {"f": {"bytes": "1"}}}}',
        '{"a": {"revision": "r", "files": {}, "listing": [1]}}',
        '{"a": {"revision": "r", "files": {"../f": {"bytes": 1, "sha256": ""}}}}',
        "\udcff",  # a byte that is not UTF-8
    ],
)
def test_a_broken_manifest_is_one_error_and_its_remedy_keeps_the_files(hub, mirror, text):
    (mirror / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    for read in (lambda: Mirror(mirror), lambda: fetch(plan(hub), mirror)):
        with pytest.raises(ValueError, match=r"manifest.json is not the manifest of a mirror .*remedy: remove it"):
            read()
    (mirror / "manifest.json").unlink()
    fetch(plan(hub), mirror)
    assert hub.downloads == [] and Mirror(mirror).verify() == []


# Models -------------------------------------------------------------------------------------------

CODE = {"pytorch_model.bin": b"pickle", "modeling_qwen.py": b"import os", "README.md": b"# Model\n"}


def files_of(model, tokenizer, folder, **options):
    """{name: content} of a model as its authors publish it, with what we never fetch."""
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return in_folder(folder) | CODE


@pytest.fixture
def published(hub, tiny_backbone, tokenizer, tmp_path, monkeypatch):
    """The configuration of 0.6B, whose backbone and teacher the hub has: tiny ones, the backbone in several files."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.chdir(Path(__file__).parents[2])
    config = load_config("0.6B", data={"mirror": str(tmp_path / "mirror"), "from": "embedded"})
    small, large = (new_model(tiny_backbone, tokenizer, seed) for seed in (0, 1))
    repo, sha = config.teacher.removeprefix("hub:").split("@")
    hub.models = {
        (config.backbone.name, config.backbone.revision): files_of(
            small, tokenizer, tmp_path / "small", max_shard_size="40KB"
        ),
        (repo, sha): files_of(large.model, tokenizer, tmp_path / "large"),
    }
    shape = {name: getattr(tiny_backbone, name) for name in SHAPE}
    return replace(config, backbone=replace(config.backbone, **shape)), small.model, large.model


def fetch_size(config):
    cli.fetch("0.6B", settings=["data.from=embedded", f"data.mirror={config.data.mirror}"])


def test_fetch_brings_the_backbone_and_the_teacher_of_a_size(hub, published, tmp_path, capsys):
    config, small, large = published
    fetch_size(config)
    printed = capsys.readouterr().out
    assert "no data to fetch" in printed
    for (repo, sha), files in hub.models.items():
        assert in_folder(tmp_path / "mirror" / repo) == {
            name: content for name, content in files.items() if name not in CODE
        }
        assert f"{repo} at {sha}: {len(files) - len(CODE)} files" in printed
    assert Mirror(tmp_path / "mirror").verify() == []
    assert not any("datasets" in path for path, _ in hub.requests)
    forget(hub)
    fetch_size(config)
    assert hub.requests and not any("/resolve/" in path for path, _ in hub.requests), "fetched again"

    backbone = tmp_path / "backbone"
    backbone.mkdir()
    copy_backbone(config.backbone, tmp_path / "mirror", backbone)
    copy_teacher(config, tmp_path / "teacher")
    assert len(list(backbone.glob("*.safetensors"))) > 1, "vacuous: one file"
    for folder, original in ((backbone, small), (tmp_path / "teacher", large)):
        loaded = Embedder.load(folder).model.state_dict()
        assert loaded.keys() == original.state_dict().keys() and len(loaded) > 20
        assert all(torch.equal(loaded[name], weight) for name, weight in original.state_dict().items())
        assert not CODE.keys() & {path.name for path in folder.iterdir()}


def test_models_that_the_hub_does_not_have_at_their_commits_are_named_at_once(hub, published, tmp_path):
    config, *_ = published
    hub.models = {(repo, OLD): files for (repo, _), files in hub.models.items()}
    with pytest.raises(
        ValueError, match=r"2 of 2 repositories cannot be fetched, nothing was:\n.*0.6B has no revision"
    ) as e:
        fetch_size(config)
    assert f"{hub.url}/codefuse-ai/F2LLM-v2-1.7B lists" in str(e.value) and not (tmp_path / "mirror").exists()
    hub.models = {(repo, sha): dict(CODE) for repo, sha in [(config.backbone.name, config.backbone.revision)]}
    with pytest.raises(
        ValueError, match=r"Qwen3-0.6B at .*no file matches '\*.json'.*\n.*has no model .*F2LLM-v2-1.7B"
    ):
        fetch_size(config)


def test_a_model_that_is_not_whole_or_not_the_one_asked_for_is_one_error(published, tmp_path):
    config, *_ = published
    folder = tmp_path / "models" / "backbone"
    folder.mkdir(parents=True)
    bring = partial(copy_backbone, mirror=tmp_path / "mirror", folder=folder)
    with pytest.raises(
        ValueError, match=r"Qwen/Qwen3-0.6B: config.json is missing, .* remedy: fetch with: f2llm fetch"
    ):
        bring(config.backbone)
    with pytest.raises(ValueError, match=r"F2LLM-v2-1.7B: config.json is missing, .* remedy: fetch with: f2llm fetch"):
        copy_teacher(config, tmp_path / "models" / "teacher")
    fetch_size(config)
    with pytest.raises(ValueError, match=rf"holds Qwen/Qwen3-0.6B at revision {config.backbone.revision}, but {OLD}"):
        bring(replace(config.backbone, revision=OLD))
    with pytest.raises(ValueError, match=rf"holds codefuse-ai/F2LLM-v2-1.7B at revision .*, but {OLD} is asked for"):
        copy_teacher(replace(config, teacher=f"hub:codefuse-ai/F2LLM-v2-1.7B@{OLD}"), tmp_path / "models" / "teacher")
    with pytest.raises(ValueError, match=r"has hidden_size 32, but backbone\.hidden_size is 1024; remedy"):
        bring(replace(config.backbone, hidden_size=1024))
    assert not (tmp_path / "models" / "teacher").exists()
    bring(config.backbone)
    shard = sorted((tmp_path / "mirror" / config.backbone.name).glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} is missing; remedy: fetch with: f2llm fetch"):
        bring(config.backbone)


# Data sets of benchmarks, and models --------------------------------------------------------------


def test_a_second_revision_of_a_data_set_is_kept_beside_the_first(hub, tmp_path):
    new = {"test.jsonl": b'{"new": 1}\n', "README.md": b"new"}
    old = {"test.jsonl": b'{"old": 1}\n', "load.py": b"import os"}
    hub.datasets = {("org/twice", SHA): new, ("org/twice", OLD): old}
    for _ in range(2):  # fetched once, planned again
        plans = plan_data_sets([("org/twice", SHA), ("org/twice", OLD)], tmp_path / "mirror", endpoint=hub.url)
        assert [plan.folder for plan in plans] == ["org/twice", f"org/twice@{OLD}"]
        for each in plans:
            fetch(each, tmp_path / "mirror")
    assert (tmp_path / "mirror/org/twice/test.jsonl").read_bytes() == new["test.jsonl"]
    assert (tmp_path / f"mirror/org/twice@{OLD}/test.jsonl").read_bytes() == old["test.jsonl"]
    assert not list((tmp_path / "mirror").rglob("*.py")), "code is never fetched"
    held = Mirror(tmp_path / "mirror")
    held.require_all(held.folder_of("org/twice", OLD), OLD, command=COMMAND)
    (tmp_path / f"mirror/org/twice@{OLD}/test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"test.jsonl is missing; remedy: fetch with: f2llm fetch --released"):
        held.require_all(held.folder_of("org/twice", OLD), OLD, command=COMMAND)


def test_a_model_is_fetched_without_pickles_and_code(hub, tmp_path):
    files = {name: name.encode() for name in ("config.json", "model.safetensors", "pytorch_model.bin", "code.py")}
    files |= {"onnx/model.json": b"{}", "1_Pooling/config.json": b"{}", "tokenizer.json": b"{}", "README.md": b"# M"}
    hub.models = {("org/model", SHA): files}
    (each,) = plan_models([f"org/model@{SHA}"], endpoint=hub.url)
    fetch(each, tmp_path / "mirror")
    kept = {"config.json", "model.safetensors", "1_Pooling/config.json", "tokenizer.json", "README.md"}
    assert in_folder(tmp_path / "mirror/org/model").keys() == kept


def test_the_data_of_a_benchmark_are_fetched_at_the_revisions_that_mteb_pins(hub, tmp_path, monkeypatch):
    from f2llm.evaluation.benchmarks import tasks_of
    from f2llm.evaluation.mirrored import repositories

    pinned = list(repositories(tasks_of(["STS22", "STS22.v2", "KorSTS"])))
    hub.datasets = {key: {"README.md": b"# R", "test.parquet": repr(key).encode()} for key in pinned}
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    words = ["fetch", "--benchmark", "STS22", "--benchmark", "STS22.v2", "--benchmark", "KorSTS"]
    result = CliRunner().invoke(cli.app, [*words, "--set", f"data.mirror={tmp_path / 'mirror'}"])
    assert result.exit_code == 0, result.output
    assert "3 repositories" in result.output
    held = Mirror(tmp_path / "mirror")
    for repo, revision in pinned:
        folder = held.folder_of(repo, revision)
        assert (tmp_path / "mirror" / folder / "test.parquet").read_bytes() == repr((repo, revision)).encode()
