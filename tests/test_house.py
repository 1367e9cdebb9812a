"""The shape of the house: imports point one way, the command line starts fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "infusion"

# A module may import from its own line and the lines above it, never below. Within the world, from anything above
# it in WORLD.
ORDER = (
    ("errors", "families", "metrics", "console"),
    ("attention", "world.vocabulary"),
    ("world",),
    ("prompts", "packing"),
    ("concept", "streams", "photos"),
    ("pipelines", "lesson", "naive"),
    ("training", "methods", "generation", "base", "sheets", "report"),
    ("features", "judged"),
    ("diagnosis", "demo", "adapters"),
    ("evaluation",),
    ("steering",),
    ("bench",),
    ("cli",),
)
WORLD = (
    "vocabulary",
    "subjects",
    "backgrounds",
    "styles",
    "truth",
    "scenes",
    "captions",
    "tokenizer",
    "dataset",
    "models",
    "grounding",
    "separation",
    "segmentation",
    "autoencoder",
    "validation",
    "runs",
    "release",
    "judge",
    "twins",
    "judge_lessons",
    "judge_figures",
    "judge_training",
    "requests",
    "questions",
    "examination",
    "picking",
    "pretrain",
)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("infusion."):
            found.add(node.module.removeprefix("infusion."))
    return found


def rank(module: str) -> int:
    for i, line in enumerate(ORDER):
        if any(module == name or module.startswith(name + ".") for name in line):
            return i
    raise AssertionError(f"{module} has no place in ORDER; give it one")


def test_imports_point_one_way():
    checked = 0
    for path in SOURCE.rglob("*.py"):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        if module in ("__init__", "errors") or path.name == "__init__.py":
            continue
        for imported in imports_of(path):
            if module.startswith("world.") and imported.startswith("world."):
                a, b = (WORLD.index(m.split(".")[1]) for m in (module, imported))
                assert b < a, f"{module} imports {imported}"
            else:
                assert rank(imported) <= rank(module), f"{module} imports {imported}"
            checked += 1
    assert checked > 40


def test_help_imports_neither_torch_nor_pydantic():
    code = (
        "import sys; sys.argv = ['infusion', 'train', '--help']\n"
        "from infusion.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'pydantic', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--photos" in done.stdout


def test_the_import_check_can_fail():
    assert rank("cli") > rank("prompts")
    assert "streams" in imports_of(SOURCE / "lesson.py")
