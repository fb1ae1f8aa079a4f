"""The source's own rules: imports point one way, what is read in one place only, nothing is unpickled, small files."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from expert_parallel.config import _Loader

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "expert_parallel").rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60

# Low to high: a module may import its own room and those below.
ROOMS = (
    "translations sentences settings config parallel nn runtime moe model checkpoint data training planning interop "
    "verify report bench study cli __main__ __init__"
)
LEVELS = {room: level for level, room in enumerate(ROOMS.split())}
MAX_MOE_ENTRIES = 12


def module_name(file: Path) -> str:
    """Without the package: moe.layer; of a folder's __init__.py the folder: moe; of the package's own: __init__."""
    *folders, name = file.relative_to(ROOT / "expert_parallel").with_suffix("").parts
    return ".".join(folders if name == "__init__" and folders else [*folders, name])


MODULES = {module_name(file): ast.parse(file.read_text()) for file in FILES}


def imports_of(tree: ast.Module) -> set[str]:
    """Full names of all that is imported, also inside functions; `from a import b` is a and a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def own_imports(tree: ast.Module) -> set[str]:
    """Modules of the package that are imported: `from a import b` is a.b where that is a module, and else a."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name.removeprefix("expert_parallel.") in MODULES else f"{node.module}" for name in inner}
    return {name.removeprefix("expert_parallel.") for name in names if name.startswith("expert_parallel.")} & set(
        MODULES
    )


def level_of(module: str) -> int:
    room = module.split(".")[0]
    assert room in LEVELS, f"{module} is in no room: give {room} a place in LEVELS"
    return LEVELS[room]


def called(tree: ast.Module) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    level = level_of(module)
    upward = {name for name in own_imports(MODULES[module]) if level_of(name) > level}
    assert not upward, f"{module} imports {sorted(upward)}, which stand above it"


@pytest.mark.parametrize("module", MODULES)
def test_the_public_names_are_for_users(module: str) -> None:
    """Within the package they would hide an import upward."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.module == "expert_parallel":
            assert [alias.name for alias in node.names] == ["__version__"], ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert "expert_parallel" not in [alias.name for alias in node.names], ast.unparse(node)


def test_no_module_imports_itself_through_others() -> None:
    TopologicalSorter({module: own_imports(tree) for module, tree in MODULES.items()}).prepare()


def test_moe_stays_easy_to_look_over() -> None:
    """Files and folders that one sees on opening it."""
    folder = ROOT / "expert_parallel" / "moe"
    entries = {file.relative_to(folder).parts[0] for file in FILES if file.is_relative_to(folder)} - {"__init__.py"}
    assert len(entries) <= MAX_MOE_ENTRIES, sorted(entries)


def test_the_whole_config_is_taken_by_those_that_may() -> None:
    whole = "expert_parallel.training.config.Config"
    users = {module for module, tree in MODULES.items() if whole in imports_of(tree)}
    names = "setup run start loop resume check comparison dead_settings generate memory failures out_of_memory"
    inside = {f"training.{name}" for name in [*names.split(), "health_advice"]}
    assert {module for module in users if level_of(module) <= LEVELS["training"]} == inside


@pytest.mark.parametrize(
    ("name", "owner"), [("yaml", "config"), ("pickle", None), ("marshal", None), ("shelve", None), ("dill", None)]
)
def test_imported_by_one_file_only(name: str, owner: str | None) -> None:
    users = [module for module, tree in MODULES.items() if name in {n.split(".")[0] for n in imports_of(tree)}]
    assert users == ([owner] if owner else [])


def test_only_runtime_reads_the_environment() -> None:
    """And the reader of configs, whose paths may name variables."""

    def reads_environment(tree: ast.Module) -> bool:
        attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        return bool((attributes | imports_of(tree)) & {"os.environ", "os.getenv", "os.environb", "os.putenv"})

    assert [module for module, tree in MODULES.items() if reads_environment(tree)] == [
        "config",
        "runtime.error_file",
        "runtime.process",
    ]


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_unpickled(module: str) -> None:
    for function, call in called(MODULES[module]):
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if function == "torch.load":
            assert arguments.get("weights_only") == "True", ast.unparse(call)
        if function in ("numpy.load", "np.load"):
            assert arguments.get("allow_pickle", "False") == "False", ast.unparse(call)
        assert not function.endswith(("_object_list", "_object", "all_gather_object")), f"pickles: {ast.unparse(call)}"
        assert function not in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load"), ast.unparse(call)


def test_yaml_is_read_by_the_safe_loader_alone() -> None:
    loads = [ast.unparse(call.args[1]) for function, call in called(MODULES["config"]) if function == "yaml.load"]
    assert set(loads) == {"_Loader"}
    assert issubclass(_Loader, yaml.SafeLoader)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_and_functions_are_small(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(MODULES[module_name(file)]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"
