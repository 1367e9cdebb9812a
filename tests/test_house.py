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
    ("errors", "families", "metrics", "console", "cores", "offloading", "files"),
    ("attention", "world.vocabulary"),
    ("world",),
    ("prompts", "packing", "config", "layers"),
    ("concept", "streams", "photos"),
    ("fit",),
    ("pipelines", "lesson", "naive"),
    ("training", "methods", "generation", "schedulers", "base", "sheets", "report"),
    ("features", "judged", "album"),
    ("diagnosis", "demo", "adapters"),
    ("evaluation",),
    ("steering", "evaluation_report"),
    ("bench", "arguments"),
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
    "arrays",
    "dataset",
    "models",
    "grounding",
    "separation",
    "segmentation",
    "runs",
    "autoencoder",
    "validation",
    "release",
    "facing",
    "judge",
    "twins",
    "judge_lessons",
    "judge_figures",
    "judge_training",
    "facing_training",
    "reader",
    "requests",
    "reward",
    "questions",
    "examination",
    "picking",
    "base_training",
    "pretrain",
)


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, however it says so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("infusion.") for alias in node.names if alias.name.startswith("infusion.")
            }
        elif isinstance(node, ast.ImportFrom) and node.module == "infusion":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("infusion."):
            found.add(node.module.removeprefix("infusion."))
    return found


def rank(module: str) -> int:
    for i, line in enumerate(ORDER):
        if any(module == name or module.startswith(name + ".") for name in line):
            return i
    raise AssertionError(f"{module} has no place in ORDER; give it one")


def wrong_way(module: str, imported: set[str]) -> set[str]:
    """Those of the imports that stand after the module in ORDER, or in WORLD within the world."""
    place = lambda m: WORLD.index(m.split(".")[1])  # noqa: E731
    inside = module.startswith("world.")
    return {
        other
        for other in imported
        if (place(other) >= place(module) if inside and other.startswith("world.") else rank(other) > rank(module))
    }


def test_imports_point_one_way():
    checked = 0
    for path in SOURCE.rglob("*.py"):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        if module in ("__init__", "errors") or path.name == "__init__.py":
            continue
        assert not wrong_way(module, imports_of(path)), module
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


def test_the_import_check_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import infusion.cli\nfrom infusion import steering\nfrom infusion.errors import InfusionError\n")
    assert imports_of(bad) == {"cli", "steering", "errors"}
    assert wrong_way("prompts", imports_of(bad)) == {"cli", "steering"}
    assert wrong_way("world.scenes", {"world.judge", "world.styles"}) == {"world.judge"}
