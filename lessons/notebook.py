"""A file of `# %%` cells as a notebook.

    python -m lessons.notebook --out one_step.ipynb              # of lessons/one_step.py
    python -m lessons.notebook FILE.py --out FILE.ipynb

Format: https://nbformat.readthedocs.io/en/latest/format_description.html, version 4.5.
"""

import json
import re
from pathlib import Path

from training import console, storage
from training.console import UserError

WALK = Path(__file__).with_name("one_step.py")


def notebook(text: str) -> dict:
    """The notebook of a file in percent format. What stands before the first mark is a cell."""
    cells = []
    parts = re.split(r"^# %%(.*)\n", f"# %%\n{text}", flags=re.MULTILINE)[1:]
    for mark, source in zip(parts[::2], parts[1::2], strict=True):
        source = source.strip("\n")
        if not source:
            continue
        cell = {"id": f"cell-{len(cells)}", "metadata": {}, "cell_type": "code"}
        if "[markdown]" in mark:
            cell["cell_type"] = "markdown"
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        else:
            cell |= {"outputs": [], "execution_count": None}
        cells.append(cell | {"source": source.splitlines(keepends=True)})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return dict(cells=cells, metadata={"kernelspec": kernel}, nbformat=4, nbformat_minor=5)


def run(argv: list[str]) -> str:
    parser = console.Parser(prog="python -m lessons.notebook", description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=WALK, help="default: the walk")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.ipynb")
    args = parser.parse_args(argv)
    try:
        text = args.file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{args.file} is no text") from None
    with storage.writing(args.out):
        args.out.write_text(json.dumps(notebook(text), indent=1, ensure_ascii=False) + "\n")
    return f"{args.out}: open it in Jupyter or VS Code; it runs within the repository's folders"


def main() -> None:
    console.command("lessons.notebook", run)


if __name__ == "__main__":
    main()
