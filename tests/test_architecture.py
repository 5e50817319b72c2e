"""What holds for the code as a whole: one direction of imports, small files, no pickle, nothing done on import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kd_dist

PACKAGE = Path(kd_dist.__file__).parent
TESTS = Path(__file__).parent

# A room is a file of kd_dist/ or a folder with all its files. A room imports only from the layers above its own line.
LAYERS = (
    ("__init__",),
    ("errors",),
    ("choose", "batch", "progress", "preempt"),
    ("views", "plan", "index", "disk", "remote", "launch", "tars", "foreign"),
    ("shards", "signals", "compress"),
    ("manifest",),
    ("inputs", "folders"),
    ("losses", "tasks", "models", "sources", "rows"),
    ("student", "teacher", "probe", "data", "recipe", "formats"),
    ("stage_rules",),
    ("rules", "loader", "joined", "ensemble", "checkpoint"),
    ("config",),
    ("pack", "extract", "evaluation", "meter", "monitor", "engine"),
    ("calibrate", "guard", "average", "cost", "report", "link", "proof", "deploy"),
    ("places", "compare", "page"),
    ("policies",),
    ("caches",),
    ("assemble",),
    ("trial",),
    ("stage",),
    ("epoch", "step"),
    ("train", "train_gan", "cache_teacher", "verify"),
    ("rehearsal", "proposals"),
    ("forecast",),
    ("budget", "contents", "doctor"),
    ("journey", "import_config"),
    ("export",),
    ("check",),
    ("cli",),
)

FILE_LINES = 400
FUNCTION_LINES = 60
LONGER = {("train.py", "train"): 80}  # the loop is one flat function

CHOSEN_ONLY = {"av", "librosa", "deepspeed", "onnx", "timm", "sklearn", "webdataset", "matplotlib", "torchvision"}
CHOSEN_ONLY |= {"datasets", "executorch", "onnxruntime", "onnxscript", "torchao"}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
ABOUT_NO_MODULE = {"faults", "architecture", "corrupt", "hostile", "parity", "published"}  # tests of the whole
ABOUT_NO_MODULE |= {"readme", "real_numbers", "recipes"}

SOURCES = {path: ast.parse(path.read_text(), str(path)) for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.Module) -> set[str]:
    """Dotted names of everything that a file imports, at any depth; `from a import b` gives `a.b` where b is ours."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found


def edges() -> list[tuple[str, str]]:
    """(module, imported module) within kd_dist."""
    pairs = [(name, other) for name, path in MODULES.items() for other in imported_modules(SOURCES[path])]
    return sorted((name, other) for name, other in pairs if other in MODULES and other != name)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_every_file_is_in_one_layer():
    listed = [name for layer in LAYERS for name in layer]
    assert len(listed) == len(set(listed)) == 77
    assert {room(path) for path in SOURCES} == set(listed)


def test_imports_run_one_way():
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    between = [(one, other) for one, other in edges() if room(MODULES[one]) != room(MODULES[other])]
    assert len(between) >= 80
    wrong = [
        f"{one} imports {other}" for one, other in between if level[room(MODULES[one])] <= level[room(MODULES[other])]
    ]
    assert not wrong


def test_imports_within_a_folder_have_no_circle():
    inside = [(one, other) for one, other in edges() if room(MODULES[one]) == room(MODULES[other])]
    assert len(inside) >= 7
    settled: set[str] = set()
    waiting = {name for pair in inside for name in pair}
    while waiting:
        free = {name for name in waiting if all(other in settled for one, other in inside if one == name)}
        assert free, f"a circle among {sorted(waiting)}"
        settled, waiting = settled | free, waiting - free


def test_files_and_functions_stay_small():
    counted = 0
    for path, tree in SOURCES.items():
        assert len(path.read_text().splitlines()) <= FILE_LINES, path
        for function in functions(tree):
            limit = LONGER.get((path.name, function.name), FUNCTION_LINES)
            assert function.end_lineno - function.lineno + 1 <= limit, f"{path}: {function.name}"
            counted += 1
    assert counted >= 200


def test_no_file_hides_a_library():
    """`accelerate launch kd_dist/train.py` puts kd_dist/ first on the module path."""
    libraries = {name.partition(".")[0] for tree in SOURCES.values() for name in imported_modules(tree)}
    assert {"torch", "json", "numpy"} <= libraries
    taken = (sys.stdlib_module_names | libraries | {"datasets", "evaluate"}) - {"kd_dist"}
    top = {room(path) for path in SOURCES}
    assert not top & taken


def test_importing_loads_no_library_that_only_a_choice_needs(tmp_path):
    """torchmetrics itself imports torchvision, an installed onnxruntime, and the lazy shell of librosa; numba shows
    whether librosa was used."""
    listed = ", ".join(repr(name) for name in MODULES)
    unwanted = CHOSEN_ONLY - {"librosa", "matplotlib", "onnxruntime", "torchvision"} | {"numba"}
    code = f"import importlib, sys\nfor name in ({listed}): importlib.import_module(name)\n"
    code += f"print(sorted(set(sys.modules) & {unwanted!r}), len([n for n in sys.modules if n.startswith('kd_dist')]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == (f"[] {len(MODULES)}\n", 0), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_library_that_only_a_choice_needs_is_imported_inside_a_function():
    found = 0
    for path, tree in SOURCES.items():
        inside = {id(node) for function in functions(tree) for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                if any(name.partition(".")[0] in CHOSEN_ONLY for name in names):
                    found += 1
                    assert id(node) in inside, f"{path}:{node.lineno}"
    assert found >= 5


def test_nothing_is_unpickled():
    guarded = 0
    for path, tree in SOURCES.items():
        assert not {name.partition(".")[0] for name in imported_modules(tree)} & UNPICKLERS, path
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            where, name = f"{path}:{call.lineno}", ast.unparse(call.func)
            options = {one.arg: ast.unparse(one.value) for one in call.keywords}
            assert name not in ("eval", "exec", "torch.save") and options.get("shell") != "True", where
            assert not name.endswith((".load_state", ".save_state")), f"{where}: accelerate unpickles"
            if name == "torch.load":
                assert options.get("weights_only") == "True", where
                guarded += 1
            if name.startswith(("np.", "numpy.")) and name.endswith((".load", ".read_array", ".save", ".write_array")):
                assert options.get("allow_pickle") == "False", where
                guarded += 1
    assert guarded >= 1


def test_what_is_public_says_what_it_is():
    """Every module, and every public function, method and class but those of one statement and those that fill in a
    base class's method."""
    described = 0
    for path, tree in SOURCES.items():
        assert ast.get_docstring(tree), path
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]
        for owner in (tree, *classes):
            fills_in = isinstance(owner, ast.ClassDef) and bool(owner.bases)
            for node in owner.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    short = len(node.body) == 1
                    described += ast.get_docstring(node) is not None
                    assert ast.get_docstring(node) or short or fills_in, f"{path}:{node.lineno} {node.name}"
    assert described >= 150


def test_every_test_file_is_named_after_what_it_tests():
    names = {name.rpartition(".")[2] for name in MODULES}
    files = [path.stem.removeprefix("test_") for path in sorted(TESTS.glob("test_*.py"))]
    assert len(files) >= 20
    assert set(files) - names <= ABOUT_NO_MODULE
