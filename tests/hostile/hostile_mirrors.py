"""Mirrors: only what `f2llm fetch` has recorded is read, whole and unchanged, and never code."""

import json
import os
import pickle
from pathlib import Path

from registry import reads, refused

from f2llm.data.fetch import adopt
from f2llm.data.mirror import Mirror, read_manifest
from f2llm.pipeline.models import copy_model

REPO, SHA = "someone/a-model", "a" * 40
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


class Harmful:
    """A pickle of this writes a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def mirror_of(tmp_path: Path, *more: str, leave_out: str = "", modules: str = "") -> Path:
    """A mirror of one model; the contents of its files are their names, of pickles a harmful object."""
    theirs = tmp_path / "theirs"
    for name in (*FILES, *more):
        if name != leave_out:
            path = theirs / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(Harmful()) if name.endswith((".bin", ".pkl")) else name.encode())
    if modules:
        (theirs / "modules.json").write_text(modules)
    adopt(tmp_path / "mirror", REPO, theirs, SHA)
    return tmp_path / "mirror"


def copying(mirror: Path, revision: str = SHA):
    """The names of the files that come out of a mirror."""

    def copy():
        out = mirror.parent / "out"
        out.mkdir()
        copy_model(mirror, REPO, revision, out)
        return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())

    return copy


def with_manifest(tmp_path: Path, change) -> Path:
    """The mirror after a change of its manifest; the change may also return another content."""
    mirror = mirror_of(tmp_path)
    path = mirror / "manifest.json"
    manifest = json.loads(path.read_text())
    other = change(manifest)
    path.write_text(other if isinstance(other, str) else json.dumps(manifest))
    return mirror


def replaced(path: Path, content: bytes) -> None:
    """Another file in its place: the mirror's files may be hard links."""
    path.unlink()
    path.write_bytes(content)


# Files that are not as they were fetched ----------------------------------------------------------


@refused("model.safetensors was changed: remove .* and fetch again")
def a_changed_file_of_the_same_size(tmp_path):
    mirror = mirror_of(tmp_path)
    path = mirror / REPO / "model.safetensors"
    replaced(path, path.read_bytes()[::-1])
    return copying(mirror)


@refused(r"has \d+ bytes, not \d+: truncated or changed", b"", b"model", b"model.safetensors and more")
def a_file_of_another_size(tmp_path, content):
    mirror = mirror_of(tmp_path)
    replaced(mirror / REPO / "model.safetensors", content)
    return copying(mirror)


@refused("config.json is missing; remedy: fetch with", "unlink", "folder")
def a_file_that_is_gone(tmp_path, kind):
    mirror = mirror_of(tmp_path)
    path = mirror / REPO / "config.json"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    return copying(mirror)


@refused("is missing", *FILES)
def a_model_without_a_file(tmp_path, name):
    return copying(mirror_of(tmp_path, leave_out=name))


@refused("was changed|truncated or changed")
def a_link_out_of_the_mirror(tmp_path):
    mirror = mirror_of(tmp_path)
    (tmp_path / "secret").write_text("not of the model's files")
    path = mirror / REPO / "tokenizer.json"
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    return copying(mirror)


@refused("holds someone/a-model at revision a+, but b+ is asked for")
def another_revision(tmp_path):
    return copying(mirror_of(tmp_path), "b" * 40)


@refused("there, but manifest.json does not list it")
def files_without_a_manifest(tmp_path):
    mirror = mirror_of(tmp_path)
    (mirror / "manifest.json").unlink()
    return copying(mirror)


@refused("model.safetensors|safetensors is missing", "pytorch_model.bin", "model.pkl", "model.pt", "model.ckpt")
def weights_in_another_form(tmp_path, name):
    return copying(mirror_of(tmp_path, name, leave_out="model.safetensors"))


# Manifests ------------------------------------------------------------------------------------------


@refused("is not the manifest of a mirror", "", "{", "[]", "7", '{"a/b": []}', '{"a/b": {"files": {}}}', "[" * 100_000)
def no_manifest(tmp_path, content):
    mirror = with_manifest(tmp_path, lambda manifest: content)
    if content == "":
        (mirror / "manifest.json").write_text("")
    return lambda: read_manifest(mirror)


@refused("could leave", "../outside.json", "/etc/passwd", "a/../../b", "C:\\\\windows", "..\\\\x", "")
def a_file_outside_its_folder(tmp_path, name):
    fact = {"bytes": 1, "sha256": "0" * 64}
    return lambda: read_manifest(with_manifest(tmp_path, lambda manifest: manifest[REPO]["files"].update({name: fact})))


@refused("could leave", "../outside", "/etc", "a/../../b")
def a_repository_outside_the_mirror(tmp_path, repo_id):
    entry = {"revision": SHA, "files": {}}
    return lambda: read_manifest(with_manifest(tmp_path, lambda manifest: manifest.update({repo_id: entry})))


@refused("could leave")
def a_listing_that_leads_outside(tmp_path):
    return lambda: read_manifest(with_manifest(tmp_path, lambda manifest: manifest[REPO].update(listing=["../x"])))


@refused("has no bytes and sha256", {"bytes": "7"}, {"sha256": "abc"}, {"sha256": "Z" * 64}, {"bytes": None})
def a_fact_that_is_none(tmp_path, change):
    def damage(manifest):
        manifest[REPO]["files"]["config.json"] |= change

    return lambda: read_manifest(with_manifest(tmp_path, damage))


@refused("is not the manifest of a mirror", {"revision": 7}, {"files": []}, {"files": {"a": 1}}, {"listing": 5})
def an_entry_of_another_version(tmp_path, change):
    return lambda: read_manifest(with_manifest(tmp_path, lambda manifest: manifest[REPO].update(change)))


# Read right -----------------------------------------------------------------------------------------


@reads(sorted(FILES))
def a_whole_model(tmp_path):
    return copying(mirror_of(tmp_path))


@reads(sorted(FILES), "pytorch_model.bin", "modeling_mine.py", "evil.pkl", "onnx/model.onnx", "sub/config.json")
def a_model_with_code_or_pickles_beside(tmp_path, name):
    return copying(mirror_of(tmp_path, name))


@reads(sorted([*FILES, "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"]))
def a_model_that_declares_its_modules(tmp_path):
    modules = '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]'
    declared = ("1_Pooling/config.json", "2_Dense/model.safetensors", "onnx/model.safetensors")
    return copying(mirror_of(tmp_path, *declared, modules=modules))


@refused(r"modules\.json is damaged: no JSON")
def a_model_whose_modules_are_damaged(tmp_path):
    return copying(mirror_of(tmp_path, modules="no JSON"))


@reads(sorted(FILES))
def a_file_put_beside_by_hand(tmp_path):
    mirror = mirror_of(tmp_path)
    (mirror / REPO / "modules.json").write_text("[]")
    return copying(mirror)


@reads(sorted(FILES))
def a_mirror_of_links_to_the_same_bytes(tmp_path):
    mirror = mirror_of(tmp_path)
    for name in FILES:
        path = mirror / REPO / name
        path.unlink()
        path.symlink_to(os.path.abspath(tmp_path / "theirs" / name))
    return copying(mirror)


@reads([])
def a_mirror_that_was_copied(tmp_path):
    mirror = mirror_of(tmp_path)
    mirror.rename(tmp_path / "elsewhere")
    return lambda: Mirror(tmp_path / "elsewhere").verify()
