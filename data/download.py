"""Reason-RFT-CoT on the disk: downloaded, unpacked and checked.

python -m data.download --task counting     # worth doing before GPUs wait for it
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data.reading import FILES
from data.reason_rft import ReasonRFTSet
from training import console, storage
from training.console import UserError
from training.settings import CACHE, TASKS

REPOSITORY = "tanhuajie2001/Reason-RFT-CoT-Dataset"  # on the Hugging Face hub
MAX_EXPANSION = 20  # images hardly shrink in a zip; an archive that grows more is refused
MAX_FILES = 1_000_000


def at_home(path: str) -> Path:
    """The path, with ~ as the home directory. UserError where the user has none (containers)."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"there is no home directory for {path} here: name another place, "
            "with --data-cache or --data, or set HOME"
        ) from None


def directory_of(source: str, cache: Path) -> Path:
    """Where the files of `source` are, or will be: see `prepare`."""
    return cache / "Reason-RFT-CoT-Dataset" if source == "reason-rft" else at_home(source)


def prepare(source: str, names: list[str], cache: Path) -> Path:
    """The directory with the files of these sets, unpacked.

    source: "reason-rft" downloads into the cache; else the directory of a copy. An interrupted call
    goes on at the next one. UserError if something is missing.
    """
    from_hub = source == "reason-rft"
    directory = directory_of(source, cache)
    if not from_hub and not directory.is_dir():
        raise UserError(
            f"no data at {directory}: --data is a directory with train_jsons and test_jsons, "
            "or reason-rft, or blocks"
        )
    splits = dict.fromkeys("train" if name.endswith("-train") else "test" for name in names)
    with storage.locked(cache / "prepare"):
        for split in splits:
            files = [FILES[name] for name in names if FILES[name].startswith(split)]
            images = directory / "images" / f"{split}_images"
            archive = directory / f"{split}_images.zip"
            if from_hub:
                download(files if images.is_dir() else [*files, archive.name], directory)
            if missing := [file for file in files if not (directory / file).is_file()]:
                raise UserError(f"{directory} has no {missing[0]}")
            if not images.is_dir() and archive.is_file():
                unpack(archive, images)
    return directory


def download(files: list[str], directory: Path) -> None:
    """Files of the data set from the hub, with a progress bar; goes on with a partial download.

    By the library's `http_get`: its `hf_hub_download` drops a partial file when the process ends.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url  # slow to import, rarely needed
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    for file in files:
        if (directory / file).is_file():
            continue
        try:
            url = hf_hub_url(REPOSITORY, file, repo_type="dataset")
            metadata = get_hf_file_metadata(url)
            version = hashlib.sha256(f"{metadata.etag} {metadata.size}".encode()).hexdigest()[:12]
            part = directory / f"{file}.{version}.part"  # a part of another version is useless
            part.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab") as content:
                http_get(
                    url,
                    content,
                    resume_size=part.stat().st_size,
                    headers=build_hf_headers(),
                    expected_size=metadata.size,
                    displayed_filename=file,
                    tqdm_class=tqdm,
                )
            os.replace(part, directory / file)
        except Exception as error:  # of the library, its HTTP client or the disk
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot download {file} of {REPOSITORY} ({reason}): try again, it goes on; "
                "or get it by hand and name its place with --data"
            ) from None


def unpack(archive: Path, target: Path) -> None:
    """Unpacks a zip archive as the folder `target`, which appears complete or not at all.

    Names may begin with "images/" and the target's own name, or not. Nothing is written outside of
    the target. UserError if a name leads out of it, if the archive grows too large or is broken.
    """
    aside = target.with_name(target.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of an earlier try
    broken = (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError)
    try:
        with zipfile.ZipFile(archive) as file, storage.writing(aside):
            entries = [entry for entry in file.infolist() if is_content(entry.filename)]
            places = [inside(entry.filename, target.name, archive) for entry in entries]
            size = sum(entry.file_size for entry in entries)
            check_size(archive, len(entries), size)
            aside.mkdir(parents=True)
            if (free := shutil.disk_usage(aside).free) < size:
                raise UserError(
                    f"{archive} needs {size / 1e9:.1f} GB in {target.parent}, "
                    f"where {free / 1e9:.1f} GB are free"
                )
            few = len(entries) < 1000
            bar = tqdm(entries, desc=f"unpacking {archive.name}", disable=few)
            for entry, place in zip(bar, places, strict=True):
                (aside / place).parent.mkdir(parents=True, exist_ok=True)
                # A source never gives more than its file_size bytes.
                with file.open(entry) as source, open(aside / place, "wb") as copy:
                    shutil.copyfileobj(source, copy)
            os.rename(aside, target)
    except (*broken, RuntimeError, zlib.error) as error:
        raise UserError(f"{archive} is broken ({error}): get it again") from None


def is_content(name: str) -> bool:
    """Whether a member of an archive is a file, and not one that macOS adds."""
    return not name.endswith(("/", "\\")) and not name.startswith("__MACOSX/")


def check_size(archive: Path, files: int, size: int) -> None:
    packed = archive.stat().st_size
    if size > MAX_EXPANSION * packed or files > MAX_FILES:
        raise UserError(
            f"{archive} claims to hold {files:,} files of {size / 1e9:.1f} GB "
            f"in {packed / 1e9:.3f} GB: that is no archive of images"
        )


def inside(name: str, folder: str, archive: Path) -> PurePosixPath:
    """A member's path in the folder; UserError if it leads out of it. Windows has backslashes."""
    path = PurePosixPath(name.replace("\\", "/"))
    parts = list(path.parts)
    if "\0" in name or ":" in name or path.is_absolute() or ".." in parts or not parts:
        raise UserError(f"{archive} holds {name!r}, which leads out of it: not unpacked")
    if parts[:2] == ["images", folder]:
        parts = parts[2:]
    elif parts[:1] == [folder]:
        parts = parts[1:]
    if not parts:
        raise UserError(f"{archive} holds a file {name!r} where a folder should be: not unpacked")
    return PurePosixPath(*parts)


def run(argv: list[str]) -> None:
    parser = console.Parser(
        prog="python -m data.download",
        description="Downloads, unpacks and checks Reason-RFT-CoT; lists what cannot be used.",
    )
    parser.add_argument("--data", default="reason-rft", help="reason-rft or a copy's directory")
    parser.add_argument("--data-cache", default=CACHE, help=f"for downloads (default: {CACHE})")
    parser.add_argument("--task", choices=TASKS, help="one of the tasks (default: all)")
    args = parser.parse_args(argv)
    cache = at_home(args.data_cache)
    for name in [name for name in FILES if name.startswith(args.task or "")]:
        questions = ReasonRFTSet(name, prepare(args.data, [name], cache), cache=cache)
        print(questions.report())
        for record in questions.left_out:
            print(f"  {FILES[name]}, record {record['record']}: {record['reason']}")


def main() -> None:
    console.command("data.download", run)


if __name__ == "__main__":
    main()
