"""The architecture as the imports have it: which package may use which, and in which direction."""

import ast
import graphlib
from pathlib import Path

import pytest

PACK = Path(__file__).parent.parent
MAY_IMPORT = {
    "toy_world": set(),
    "moa_core": set(),
    "nodes": {"moa_core", "toy_world"},
    "training": {"moa_core", "toy_world"},
}
"""Each package of the pack, and which others it may use."""
ROOMS = ("host", "data", "finetune", "evaluation", "toy")
"""The libraries of training/, from the lowest up: none imports one above it."""
NODE_ROOMS = ("host", "photos", "experts", "prompt", "sampling", "evidence")
"""The rooms of nodes/, from the lowest up; the nodes themselves, one file each, stand above them."""
CORE = (("address", "attention", "files"), ("subjects",), ("routing",), ("adapters", "learned"), ("run",))
"""The rooms of moa_core/ by floor, from the lowest up: none imports one above it or beside it."""
HOSTS = {"comfy": "nodes", "comfy_api": "nodes", "folder_paths": "nodes"} | {
    "diffusers": "training",
    "accelerate": "training",
}
"""Who alone may import a host."""
COMMANDS = {"train", "prepare", "latents", "shards", "vital", "evaluate", "throughput", "toy.measure"}
"""Modules of training/ that are run; a folder's __main__ is one, too."""


def modules() -> dict[str, Path]:
    """Every module of the four packages by its dotted name."""
    paths = [path for package in MAY_IMPORT for path in (PACK / package).rglob("*.py")]
    dotted = {path: ".".join(path.relative_to(PACK).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in dotted.items()}


MODULES = modules()


def imports(name: str) -> set[str]:
    """What a module imports, wherever in it, as dotted names: modules of the pack whole, others by their package."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # `from ..moa_core` in nodes/ is the pack's moa_core
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {_module(one) for one in found} - {name}


def _module(name: str) -> str:
    """The module of the pack that an imported name is, or is in; of anything else the package."""
    while name not in MODULES and name.split(".")[0] in MAY_IMPORT and "." in name:
        name = name.rpartition(".")[0]
    return name if name in MODULES else name.split(".")[0]


def test_packages_import_downwards_only():
    for name in MODULES:
        own = name.split(".")[0]
        used = {other.split(".")[0] for other in imports(name)} & MAY_IMPORT.keys()
        assert used <= MAY_IMPORT[own] | {own}, f"{name} imports {used}"


def test_a_host_is_imported_on_its_own_side_alone():
    for name in MODULES:
        for host in imports(name) & HOSTS.keys():
            assert HOSTS[host] == name.split(".")[0], f"{name} imports {host}"


@pytest.mark.parametrize(("package", "rooms"), [("training", ROOMS), ("nodes", NODE_ROOMS)])
def test_rooms_import_downwards_only(package, rooms):
    for name in MODULES:
        parts = name.split(".")
        if parts[0] != package or parts[1:2] == [] or parts[1] not in rooms:
            continue
        above = rooms[rooms.index(parts[1]) + 1 :]
        for other in imports(name):
            assert other.split(".")[:2] not in [[package, room] for room in above], (
                f"{name} imports {other}, which is above it"
            )


def test_rooms_of_nodes_import_no_node():
    for name in MODULES:
        if name.startswith(tuple(f"nodes.{room}" for room in NODE_ROOMS)):
            for other in (other.split(".") for other in imports(name) if other.startswith("nodes.")):
                assert other[1] in NODE_ROOMS, f"{name} imports {'.'.join(other)}, which stands above the rooms"


def test_rooms_of_moa_core_import_lower_floors_only():
    floor_of = {room: number for number, rooms in enumerate(CORE) for room in rooms}
    for name in MODULES:
        parts = name.split(".")
        if parts[0] != "moa_core" or len(parts) == 1:
            continue
        own = floor_of[parts[1]]  # KeyError: a room that nobody gave a floor
        for other in (other.split(".") for other in imports(name) if other.startswith("moa_core.")):
            lower = floor_of[other[1]] < own or own == 0
            assert other[1] == parts[1] or lower, f"{name} imports {'.'.join(other)}, which is not below it"


def test_nothing_imports_a_command():
    commands = {f"training.{name}" for name in COMMANDS} | {name for name in MODULES if name.endswith("__main__")}
    assert commands <= MODULES.keys()
    for name in MODULES:
        assert not imports(name) & commands, f"{name} imports {imports(name) & commands}"


def test_no_import_goes_in_a_circle():
    graph = {name: imports(name) & MODULES.keys() for name in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_its_own_modules_in_one_way(package):
    """nodes/, moa_core/ and toy_world/ are parts of ComfyUI's custom_nodes there: relative. training/ is not."""
    for name, path in MODULES.items():
        if name.split(".")[0] != package:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and package == "training":
                assert node.level == 0, f"{path} imports relatively"
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] not in MAY_IMPORT, f"{path} imports absolutely"
