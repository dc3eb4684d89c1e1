"""The house rules that a reader cannot see in one file: floors, outside imports, flat folders, short files."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "data": {"data"},
    "heads": {"heads", "data"},
    "infer": {"infer", "heads", "data"},
    "train": {"train", "infer", "heads", "data"},
}
FORBIDDEN_NAMES = {"utils", "common", "misc", "base", "core", "manager", "helper", "v2"}
LONGEST_FILE = 300
# The pre-training script and its parts; the embedded tiny Wan is built from the stock classes themselves.
PRETRAINING = ["train/pretrain*.py", "train/block_codec.py"]
# Who may import what from outside; a package with an empty list may be imported nowhere. The readers of video files
# live in data/video.py, which data/clip.py stands on: only there are decord and PyAV known.
OUTSIDE = {
    "diffusers": ["heads/*.py", *PRETRAINING],
    "peft": ["heads/*.py", *PRETRAINING],
    "transformers": ["heads/*.py", "infer/measure_*.py", *PRETRAINING],
    "decord": ["data/video.py"],
    "av": ["data/video.py"],
    "cv2": ["infer/track_points.py"],  # 70 MB and a video reader of its own: one file knows it
    "gradio": ["infer/app.py"],
    "wandb": [],
    "tensorboard": [],
    "deepspeed": [],
}
MODULES = sorted(path for room in FLOORS for path in (ROOT / room).glob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, also inside functions and under TYPE_CHECKING, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            one_deep = module == "motionlora"  # `from motionlora import heads`
            yield from ((f"{module}.{alias.name}" if one_deep else module, node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_its_own_floor_or_one_below(path: Path) -> None:
    allowed = FLOORS[path.parent.name]
    for module, line in imports_of(path):
        assert not module.startswith("."), f"{name_of(path)}:{line} imports {module}: write motionlora.x.y in full."
        top, _, rest = module.partition(".")
        assert top not in {*FLOORS, "configs"}, f"{name_of(path)}:{line} imports {module}: write motionlora.{module}."
        if top == "motionlora":
            floor = rest.partition(".")[0]
            assert floor in allowed, f"{name_of(path)}:{line} imports {module}, above its own floor {path.parent.name}."


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_outside_packages_are_imported_only_where_they_belong(path: Path) -> None:
    for module, line in imports_of(path):
        top = module.partition(".")[0]
        places = OUTSIDE.get(top, ["*"])
        assert any(fnmatch(name_of(path), place) for place in places), (
            f"{name_of(path)}:{line} imports {top}, which belongs to {', '.join(places) or 'no file of this project'}."
        )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_import_is_a_declared_dependency(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + [name for names in project["optional-dependencies"].values() for name in names]
    words = {name.partition(";")[0].partition(">")[0].partition("=")[0].strip().lower() for name in declared}
    names = {"pillow": "PIL", "pyyaml": "yaml", "protobuf": "google", "opencv-python-headless": "cv2"}
    modules = {names.get(word, word) for word in words}
    # huggingface_hub comes with diffusers and transformers, which stand on it
    known = modules | set(sys.stdlib_module_names) | {"motionlora", "huggingface_hub"}
    for module, line in imports_of(path):
        top = module.partition(".")[0]
        assert top in known, f"{name_of(path)}:{line} imports {top}, which pyproject.toml does not name."


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_file_fits_its_reader(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{name_of(path)} has {lines} lines, at most {LONGEST_FILE} are allowed: split it."
    assert path.stem not in FORBIDDEN_NAMES, f"{name_of(path)} says nothing by its name: call it after what it defines."


def test_package_map_folders_and_list_agree() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == {*FLOORS, "configs"}, "a top-level package is new or gone: update FLOORS and pyproject."
    assert setuptools["package-dir"] == {f"motionlora.{name}": name for name in folders}
    assert set(setuptools["packages"]) == {f"motionlora.{name}" for name in folders}
    assert not (ROOT / "__init__.py").exists(), "motionlora is only a name: the root has no __init__.py."


def test_folders_are_flat() -> None:
    nested = [name_of(path) for room in [*FLOORS, "configs", "tests"] for path in (ROOT / room).glob("*/**/*.py")]
    assert nested == [], f"{nested} are in nested folders, which an installed package leaves out: move them up."


def test_configs_hold_values_only() -> None:
    assert [path.name for path in (ROOT / "configs").glob("*.py")] == ["__init__.py"]
    body = ast.parse((ROOT / "configs/__init__.py").read_text()).body
    assert all(isinstance(node, ast.Expr) for node in body), "configs/__init__.py holds code: keep a docstring only."


def test_the_type_checker_sees_every_room() -> None:
    links = {path.name: path.resolve() for path in (ROOT / ".pyright/motionlora").iterdir()}
    assert links == {name: ROOT / name for name in [*FLOORS, "configs"]}, "every room needs a link in .pyright."


def test_the_readme_lists_every_file() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Files")[2].partition("##")[0]
    listed, room = set(), ""
    for word in (line[:40].split("  ")[0 if line[:1].strip() else 1] for line in tree.splitlines() if line.strip()):
        room = word if word.endswith("/") and word != "tiny_wan/" else room
        listed.add(word if word == room else room + word)
    rooms = [*FLOORS, "configs", "tests"]
    files = {name_of(path) for room in rooms for path in (ROOT / room).glob("*.*") if path.suffix in (".py", ".yaml")}
    files -= {f"{room}/__init__.py" for room in rooms}
    assert files - listed == set(), "the README's file tree lacks these: add a line for each."
    gone = {name for name in listed if name.endswith((".py", ".yaml"))} - files
    assert gone == set(), "the README's file tree has files that are gone: remove their lines."
