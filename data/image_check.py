"""Every image is decoded once before training; the result is kept in a file."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from data.pictures import look_into
from training import storage


def check_images(
    paths: list[Path], name: str, file: Path | None
) -> tuple[dict[Path, str], dict[Path, list[int]]]:
    """The images that cannot be used, each with the reason, and [width, height] of the others.

    Results are kept in `file` (None: nowhere) and hold until an image changes.
    """
    paths = list(dict.fromkeys(paths))
    stamps = [stamp(path) for path in paths]
    # One process looks, the others read its results.
    with storage.locked(file) if file else nullcontext():
        seen = images_seen(file) if file else {}
        new = [i for i, path in enumerate(paths) if seen.get(str(path), [None])[0] != stamps[i]]
        with ThreadPoolExecutor() as threads:  # PIL decodes beside Python
            found = threads.map(look_into, [paths[i] for i in new])
            few = len(new) < 1000
            bar = tqdm(found, total=len(new), desc=f"{name}: checking images", disable=few)
            for i, (problem, size) in zip(new, bar, strict=True):
                seen[str(paths[i])] = [stamps[i], problem, size]
        if file and new:
            with storage.writing(file):
                storage.write_aside(file, json.dumps(seen))
    broken = {path: problem for path in paths if (problem := seen[str(path)][1])}
    return broken, {path: seen[str(path)][2] for path in paths}


def stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def images_seen(file: Path) -> dict[str, list]:
    """[stamp, problem, size] of images by their paths; anything else in a file is ignored."""
    try:
        seen = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(seen, dict):
        return {}
    return {path: entry for path, entry in seen.items() if is_entry(entry)}


def is_entry(entry) -> bool:
    match entry:
        case [[int(), int()], str(), None]:
            return bool(entry[1])
        case [[int(), int()], None, [int(width), int(height)]]:
            return width > 0 and height > 0
    return False
