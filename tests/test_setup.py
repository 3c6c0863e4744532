"""Set-up and structure: the Makefile's search for Python, layers, containment of NNX, start-up."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxft"

# Modules and rooms of jaxft from the lowest to the highest; each imports those before it alone.
ROOMS = """errors extensions formatting files console distributed hardware sharding hf models config
config_file flags data training workdir reporting compiled planner programs service __init__ demo
cli __main__""".split()
# Beside that: data and hf speak arrays and flat dicts, models take their own config.
STRANGERS = [("data", "models"), ("hf", "models"), ("models", "config")]

# Lines that a file has at most, unless it says why.
MOST_LINES = 450

HEAVY = "jax jaxlib flax optax orbax transformers datasets grain jinja2 rich".split()

NNX_ANYWHERE = {"Module", "Rngs", "List"}
NNX_IN_MODULE_PY = NNX_ANYWHERE | set(
    "Param data split merge eval_shape graphdef state to_flat_state from_flat_state "
    "to_pure_dict replace_by_pure_dict iter_modules".split()
)


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text(), filename=str(path))


def component(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_modules(path: Path, tree: ast.AST) -> Iterator[str]:
    """Yields dotted names; `from a import b` gives `a.b`, which may be a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively; write jaxft.…"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def component_imports() -> dict[str, set[str]]:
    """Returns which components of jaxft each one imports, inside functions as well."""
    imports: dict[str, set[str]] = {}
    for path, tree in sources():
        found = imports.setdefault(component(path), set())
        for name in imported_modules(path, tree):
            package, _, rest = name.partition(".")
            if package == "jaxft":
                first = rest.partition(".")[0]
                found.add(first if first in ROOMS else "__init__")
        found.discard(component(path))
    return imports


def module_imports() -> dict[str, set[str]]:
    """Returns which modules of jaxft each one imports, inside functions as well, by dotted name."""
    trees = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): (path, tree)
        for path, tree in sources()
    }
    imports: dict[str, set[str]] = {}
    for module, (path, tree) in trees.items():
        found = imports.setdefault(module, set())
        for name in imported_modules(path, tree):
            package, _, rest = name.partition(".")
            if package == "jaxft":
                # `from jaxft.a import b` is of the module a.b, or of the name b in a.
                found.add(rest if rest in trees else rest.rpartition(".")[0] or "__init__")
    return imports


def test_rooms_are_those_that_there_are():
    assert {component(path) for path, _ in sources()} == set(ROOMS)


def test_imports_go_down_only():
    upward = [
        f"{importer} imports {imported}"
        for importer, found in component_imports().items()
        for imported in found
        # The package reaches what it exports by name alone, and the demo starts the command.
        if ROOMS.index(imported) > ROOMS.index(importer)
    ]
    assert not upward


@pytest.mark.slow(seconds=3)
def test_no_modules_import_each_other_in_a_circle():
    """Inside a room as well."""
    found = module_imports()
    # The command line is reached from the package only by name, and everything from it.
    for entry in ("__init__", "__main__", "cli"):
        found.pop(entry, None)
    graphlib.TopologicalSorter(found).prepare()


def test_long_files_say_why_they_are_one():
    long = [
        str(path)
        for path, tree in sources()
        if len((PACKAGE / path).read_text().splitlines()) > MOST_LINES
        and "One file because" not in (ast.get_docstring(tree) or "")
    ]
    assert not long, "cut them by concern, or say in their docstring: One file because …"


def test_data_hf_and_models_keep_to_themselves():
    imports = component_imports()
    assert [pair for pair in STRANGERS if pair[1] in imports.get(pair[0], ())] == []


def nnx_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "nnx"
        ):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax"):
            yield from (
                (node.lineno, alias.name)
                for alias in node.names
                if (node.module, alias.name) != ("flax", "nnx") or alias.asname
            )
        elif isinstance(node, ast.Import):
            yield from (
                (node.lineno, alias.name) for alias in node.names if alias.name.startswith("flax")
            )


def test_nnx_stays_in_module_py():
    strays = [
        f"{path}:{line} nnx.{name}"
        for path, tree in sources()
        for line, name in nnx_names(tree)
        if name not in (NNX_IN_MODULE_PY if str(path) == "models/module.py" else NNX_ANYWHERE)
    ]
    assert not strays


@pytest.mark.slow(seconds=3)
def test_nothing_shards_behind_our_back():
    strays = []
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "out_sharding":
                strays.append(f"{path}:{node.lineno} out_sharding=")
            if (
                isinstance(node, ast.Attribute | ast.Name)
                and ast.unparse(node).endswith("with_sharding_constraint")
                and str(path) != "sharding/rules.py"
            ):
                strays.append(f"{path}:{node.lineno} with_sharding_constraint")
    assert not strays


# By the name of their module, where it differs.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "multipart": "python-multipart",
    "orbax": "orbax-checkpoint",
    "yaml": "pyyaml",
}
# Used when it is there; and what other packages import for us, as pyproject.toml says beside each.
OPTIONAL, INDIRECT = {"openai", "wandb"}, {"protobuf", "sentencepiece", "tiktoken"}
# The service alone needs more.
SERVICE_INDIRECT = {"python-multipart"}


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=;]", line)[0].lower() for line in requirements}


def test_what_is_imported_is_declared_and_the_other_way_round():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = names_of(project["dependencies"])
    imported: dict[bool, set[str]] = {False: set(), True: set()}
    for path, tree in sources():
        modules = {module.partition(".")[0] for module in imported_modules(path, tree)}
        imported[component(path) == "service"] |= {
            DISTRIBUTIONS.get(name, name.lower().replace("_", "-"))
            for name in modules - sys.stdlib_module_names - OPTIONAL - {"jaxft"}
        }
    assert imported[False] | INDIRECT == declared
    more = imported[True] - declared
    assert more | SERVICE_INDIRECT == names_of(project["optional-dependencies"]["serve"])


def long_marks(path: Path) -> Iterator[tuple[int, ast.Attribute, bool]]:
    """Yields line and node of each mark of a long test in a file, and whether it says how long."""
    tree = ast.parse(path.read_text(), filename=str(path))
    timed = {
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and "seconds" in {keyword.arg for keyword in node.keywords}
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("slow", "matrix", "real_data"):
            yield node.lineno, node, node in timed


def test_every_strategy_is_where_ci_looks_for_it():
    """Finding the tests of all folders takes each worker some ten seconds."""
    found = {
        path.parent.name
        for path in (ROOT / "tests").rglob("*.py")
        for _, node, _ in long_marks(path)
        if node.attr == "matrix"
    }
    assert found == {"sharding"}
    assert "marked matrix tests/sharding" in (ROOT / ".ci/run").read_text()


def test_long_tests_say_how_long_they_take():
    """They are begun by it, the longest first."""
    untimed = [
        f"{path.name}:{line} {ast.unparse(node)} has no seconds="
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line, node, timed in long_marks(path)
        if not timed
    ]
    assert not untimed


def start(*arguments: str) -> tuple[float, set[str]]:
    """Returns seconds that `jaxft ARGUMENTS` took and the top-level modules it had imported."""
    code = (
        "import sys, jaxft, jaxft.config, jaxft.errors, jaxft.cli\n"
        f"sys.argv = ['jaxft', *{arguments!r}]\n"
        "try: status = jaxft.cli.main()\n"
        "except SystemExit as end: status = end.code\n"
        "assert not status, status\n"
        "print('\\nMODULES', *sys.modules)\n"
    )
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - began
    assert run.returncode == 0, run.stderr
    return seconds, {name.partition(".")[0] for name in run.stdout.split("MODULES")[-1].split()}


def test_help_is_shown_in_two_seconds_and_imports_nothing_heavy():
    runs = [start("--help") for _ in range(3)]
    assert not runs[0][1] & set(HEAVY)
    assert min(seconds for seconds, _ in runs) < 2


# A Python that knows only what the Makefile asks of it, and writes down what that was. Code is
# run by the real one, which is told to be of the fake's version.
FAKE_PYTHON = """\
#!/bin/sh
echo "{name} $*" >> "$CALLS"
case "$1 $2" in
    -c\\ *) exec "{real}" -c 'import sys; sys.version_info = {info}; exec(sys.argv[1])' "$2" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") {pip} ;;
esac
"""
FAKE_UV = """\
#!/bin/sh
echo "uv $*" >> "$CALLS"
mkdir -p .venv/bin && cp "$CANDIDATE" .venv/bin/python
"""


class Clone:
    """A folder with the Makefile, and a PATH on which only chosen programs exist."""

    def __init__(self, folder: Path):
        self.root = folder / "a clone"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        self.root.mkdir()
        self.bin.mkdir()
        for name in ("Makefile", "pyproject.toml", "tools"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.root / name)
        for tool in ("sh", "mkdir", "cp", "rm", "touch", "date"):
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.skip(f"needs {tool}"))

    def add(self, name: str, version: str, pip: str = "true") -> None:
        info = tuple(map(int, version.split(".")))
        text = FAKE_PYTHON.format(name=name, real=sys.executable, info=info, pip=pip)
        self.add_script(name, text)

    def add_script(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def make(self, **environ: str) -> subprocess.CompletedProcess[str]:
        make = shutil.which("make") or pytest.skip("needs make")
        environ = {
            "PATH": str(self.bin),
            "HOME": str(self.bin),
            "CALLS": str(self.calls_file),
            **environ,
        }
        command = [make, ".venv/.installed"]
        return subprocess.run(
            command, cwd=self.root, env=environ, capture_output=True, text=True, check=False
        )

    def calls(self, word: str) -> list[str]:
        """Returns the recorded calls that contain `word`, and forgets all."""
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [call for call in calls if word in call]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_make_takes_the_newer_python_on_the_path(clone: Clone):
    clone.add("python3", "3.11.2")
    clone.add("python3.13", "3.13.0")
    run = clone.make()
    assert run.returncode == 0, run.stderr
    assert clone.calls("-m venv") == ["python3.13 -m venv .venv"]


def test_make_installs_once_and_again_when_pyproject_changes(clone: Clone):
    clone.add("python3.12", "3.12.1")
    assert clone.make().returncode == 0
    assert len(clone.calls("pip install")) == 1
    assert clone.make().returncode == 0
    assert clone.calls("") == []
    changed = time.time() + 10
    os.utime(clone.root / "pyproject.toml", (changed, changed))
    clone.make()
    calls = clone.calls("-m")
    assert len(calls) == 1 and "pip install" in calls[0], "the environment itself is kept"


def test_make_skips_a_shim_that_fails(clone: Clone):
    clone.add_script("python3.12", "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n")
    clone.add("python3", "3.14.1")
    run = clone.make()
    assert run.returncode == 0 and not run.stderr
    assert clone.calls("-m venv") == ["python3 -m venv .venv"]


def test_make_finds_a_python_that_pyenv_has_but_does_not_select(clone: Clone):
    clone.add(".pyenv/versions/3.13.0/bin/python3", "3.13.0")
    assert clone.make().returncode == 0


def test_make_uses_uv_where_no_python_is_new_enough(clone: Clone):
    clone.add("python3", "3.11.2")
    clone.add("elsewhere/python", "3.12.1")
    clone.add_script("uv", FAKE_UV)
    assert clone.make(CANDIDATE=str(clone.bin / "elsewhere/python")).returncode == 0
    assert clone.calls("uv ") == ["uv venv --quiet --python 3.12 --seed .venv"]


def test_make_says_in_one_line_that_python_is_too_old(clone: Clone):
    clone.add("python3", "3.11.2")
    run = clone.make()
    assert run.returncode != 0
    [line] = [line for line in run.stderr.splitlines() if not line.startswith("make:")]
    assert "needs Python 3.12 or newer" in line and "3.11.2 at" in line
    assert not (clone.root / ".venv").exists()


def test_make_starts_again_after_an_installation_that_broke_off(clone: Clone):
    clone.add("python3.12", "3.12.1", pip="exit 1")
    assert clone.make().returncode != 0
    clone.add("python3.12", "3.12.1")
    clone.calls("")
    assert clone.make().returncode == 0
    assert clone.calls("-m venv") != []


def tracked_texts() -> Iterator[tuple[str, str]]:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs a git clone")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        try:
            yield name, (ROOT / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # binary, or deleted and not yet committed


def test_files_name_no_machine_and_no_package_registry():
    # In pieces, so that this file does not name them either.
    hosts = ["pypi" + ".org", "python" + "hosted.org", "npm" + "js.", "deb." + "debian"]
    places = ["/" + name + "/" for name in ("root", "work", "home")]
    pattern = re.compile(rf"{'|'.join(map(re.escape, hosts))}|(?<![\w.~}}])({'|'.join(places)})")
    found = {
        name: match.group() for name, text in tracked_texts() if (match := pattern.search(text))
    }
    assert not found


def test_no_lock_file_is_tracked():
    assert "uv.lock" not in {name for name, _ in tracked_texts()}


def test_the_console_script_and_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"jaxft": "jaxft.cli:main"}
    assert project["requires-python"] == f">={(ROOT / '.python-version').read_text().strip()}"
