"""TODO data.image_check"""

from __future__ import annotations

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
    """Which of these images cannot be used, and why; and width and height of the others. What was
    found once is kept in `file` and counts until an image changes."""
    paths = list(dict.fromkeys(paths))
    stamps = [[stat.st_size, stat.st_mtime_ns] for stat in (path.stat() for path in paths)]
    with (
        storage.locked(file) if file else nullcontext()
    ):  # one process looks, the others read what it found
        seen = images_seen(file) if file else {}
        new = [i for i, path in enumerate(paths) if seen.get(str(path), [None])[0] != stamps[i]]
        with ThreadPoolExecutor() as threads:  # PIL decodes beside Python
            found = threads.map(look_into, [paths[i] for i in new])
            bar = tqdm(
                found, total=len(new), desc=f"{name}: checking images", disable=len(new) < 1000
            )
            for i, (problem, size) in zip(new, bar, strict=True):
                seen[str(paths[i])] = [stamps[i], problem, size]
        if file and new:
            with storage.writing(file):
                storage.write_aside(file, json.dumps(seen))
    broken = {path: problem for path in paths if (problem := seen[str(path)][1])}
    return broken, {path: seen[str(path)][2] for path in paths}


def images_seen(file: Path) -> dict[str, list]:
    """What is known of images by their paths: [stamp, problem, size]. Whatever else a file holds
    is as good as none."""
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
