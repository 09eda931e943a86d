"""The tree of the README: every module of the package with the first sentence of its docstring.

python scripts/tree.py            prints it
python scripts/tree.py --write    puts it into README.md
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ossature"

# In the order of the flow; a new folder needs a line here.
FOLDERS = {
    "data": "text -> batches of tokens",
    "kernels": "fused forms; import nothing of ours, and each has an eager twin in model/",
    "model": "the network; no ranks, no files",
    "parallel": "the network -> shards, from outside",
    "train": "the loop",
    "checkpoint": "state <-> disk",
    "convert": "native <-> other formats",
    "sample": "weights -> text",
    "eval": "weights -> numbers: questions asked, answers counted",
    "talk": "a model that people and programs talk to",
}


def tree() -> str:
    lines = ["ossature/", *files(PACKAGE, "  ")]
    for folder, purpose in FOLDERS.items():
        lines += [f"  {folder + '/':<24}{purpose}", *files(PACKAGE / folder, "    ")]
    return "\n".join(lines)


def files(folder: Path, indent: str) -> list[str]:
    """One line a module; empty `__init__` files are left out."""
    modules = [path for path in sorted(folder.glob("*.py")) if path.stat().st_size]
    return [f"{indent + path.name:<26}{sentence(path)}" for path in modules]


def sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert docstring, f"{path}: say what it is, in a docstring"
    return re.split(r"(?<=[^\s.])\.(?=\s|$)", docstring.split("\n\n")[0], maxsplit=1)[0].replace(
        "\n", " "
    )


def with_tree(readme: str) -> str:
    """The README with the tree as it is now."""
    return re.sub(r"(?<=^```\n)ossature/\n.*?(?=^```)", lambda _: tree() + "\n", readme,
                  count=1, flags=re.MULTILINE | re.DOTALL)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        path = ROOT / "README.md"
        path.write_text(with_tree(path.read_text("utf-8")), "utf-8")
    else:
        print(tree())
