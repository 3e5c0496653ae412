"""The programs beside the three scripts, and which file may import which."""

import ast
import graphlib
import importlib
import re
import signal
import sys
import types
from pathlib import Path

import pytest
from conftest import ROOT, run

from kernels import benchmark_step, gpu_check

SCRIPTS = {"train_cgn", "generate", "train_classifier"}
PROGRAM_FILES = (
    "kernels/benchmark*.py",
    "kernels/compile_check.py",
    "kernels/gpu_check.py",
    "data/digit_folder.py",
    "data/pretrained/*.py",
)
PROGRAMS = sorted(
    path.relative_to(ROOT) for pattern in PROGRAM_FILES for path in ROOT.glob(pattern)
)
MODULES = sorted(
    path.relative_to(ROOT)
    for folder in ("data", "kernels")
    for path in (ROOT / folder).glob("*.py")
    if path.relative_to(ROOT) not in PROGRAMS
)

# The modules of data/. Each may import those before it, and kernels.
LAYERS = (
    "data.runs",
    "data.synthetic",
    "data.download",
    "data.weights",
    "data.imagenet",
    "data.mnist",
    "data.folders",
    "data.pictures",
    "data.checkpoints",
)


# --------------------------------------------------------------------------------------------------
# Command lines


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_program_describes_itself(program):
    output = run(program, "--help").stdout
    assert output.startswith("usage: ") and program.name in output


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_program_refuses_unknown_and_abbreviated_flags(program):
    # What the program cannot do without comes first: it would be the complaint otherwise.
    needed = {
        "scenes.py": "--out x",
        "halve.py": "x y",
        "digit_folder.py": "--dataset colored_mnist --out x",
    }
    needed = needed.get(program.name, "").split()
    error = run(program, *needed, "--unknown", "--hel", expect=2).stderr
    assert "error: unrecognized arguments: --unknown --hel" in error


def test_benchmark_of_a_digits_step_times_every_level():
    output = run("kernels/benchmark_step.py", "--rounds", 1, "--batch-size", 2).stdout
    times = re.findall(r"^(.+?) +[\d.]+ ms +\d+ %$", output, re.MULTILINE)
    plain, *changes = benchmark_step.timed_levels().values()
    assert times == [plain, *(f"+ {name}" for name in changes)]


@pytest.mark.parametrize("small", [False, True])
def test_commands_for_a_gpu_are_taken_by_their_programs(small, tmp_path, monkeypatch):
    """The hour on a GPU is no time to find a flag renamed."""
    words = ["gpu_check.py", "--device", "cpu", "--out", str(tmp_path / "gpu")]
    words += ["--small"] if small else ["--data-dir", "mnist", "--weights-dir", "vgg"]
    monkeypatch.setattr(sys, "argv", words)
    checks = gpu_check.list_checks(gpu_check.parse_args())
    assert len(checks) == 6
    for check in checks:
        for command in check.commands:
            program, *flags = map(str, command.words)
            monkeypatch.setattr(sys, "argv", [program, *flags])
            if program != "-m":
                path = Path(program).with_suffix("")
                importlib.import_module(".".join(path.parts)).parse_args()
            assert command.limit <= 600


def test_the_report_of_a_gpu_check(tmp_path):
    """A command that stops at SIGTERM, and one that does not end."""
    slow = "import time; print('begun', flush=True); time.sleep(60)"
    command = gpu_check.Command(["-c", slow], 60, stop_after=1)
    assert gpu_check.run_command(command)[0] == -signal.SIGTERM
    code, seconds, output = gpu_check.run_command(gpu_check.Command(["-c", slow], 1))
    assert code == -signal.SIGKILL and seconds < 30
    assert output.splitlines() == ["begun", "stopped after 1 s"]


def test_a_gpu_check_stops_what_its_command_has_started():
    sleep = "import time; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{sleep}'])"
    code, seconds, _ = gpu_check.run_command(gpu_check.Command(["-c", parent], 1))
    assert code == -signal.SIGKILL and seconds < 30


def test_a_gpu_check_empties_no_other_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").is_file()


# --------------------------------------------------------------------------------------------------
# Names and imports


@pytest.mark.parametrize("path", PROGRAMS, ids=str)
def test_program_uses_names_that_exist(path):
    """No linter sees that another file has renamed a function: `train_cgn.derive`."""
    program = importlib.import_module(module_name(path))
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = getattr(program, node.value.id, None)
            if isinstance(module, types.ModuleType):
                assert hasattr(module, node.attr), f"{path}:{node.lineno}: {ast.unparse(node)}"


def module_name(path):
    """kernels/eager.py -> kernels.eager, kernels/__init__.py -> kernels."""
    parts = path.with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def imported_modules(path):
    """The files of the repository that one imports anywhere, by their modules' names."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if is_ours(submodule) else node.module)
    return {name for name in names if is_ours(name)}


def is_ours(name):
    """Whether a module's name is that of a file or package of the repository."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_imports_are_found():
    assert imported_modules(Path("kernels/benchmark_step.py")) >= {
        "train_cgn",
        "data.weights",
        "kernels",
    }
    assert imported_modules(Path("kernels/eager.py")) >= {"kernels.composite", "kernels.gram"}
    assert len(PROGRAMS) >= 6 and len(MODULES) >= 10


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_module_imports_no_script(path):
    assert not imported_modules(path) & SCRIPTS


def test_nobody_imports_a_program():
    programs = {module_name(path) for path in PROGRAMS}
    scripts = [Path(f"{name}.py") for name in sorted(SCRIPTS)]
    for path in (*scripts, *MODULES, *PROGRAMS):
        assert not imported_modules(path) & programs, path


def test_imports_have_no_circle():
    graph = {module_name(path): imported_modules(path) for path in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_imports_go_down_the_layers():
    for path in MODULES:
        name = module_name(path)
        imported = imported_modules(path)
        if path.parts[0] == "kernels":
            assert not {other for other in imported if other.startswith("data")}, path
        elif name != "data":
            below = set(LAYERS[: LAYERS.index(name)])
            above = {other for other in imported if other.startswith("data")} - below
            assert not above, f"{name} imports {above}"


# Files that can be copied alone repeat two helpers of a few lines.
SHARED_NAMES = {"main", "parse_args", "on_device", "empty_like"}


def test_no_two_functions_share_a_name():
    """A name found in one place is the only one of its kind."""
    homes = {}
    for path in (*sorted(Path(f"{name}.py") for name in SCRIPTS), *MODULES, *PROGRAMS):
        for node in ast.parse((ROOT / path).read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                homes.setdefault(node.name, []).append(str(path))
    shared = {name: paths for name, paths in homes.items() if len(paths) > 1}
    assert shared.keys() <= SHARED_NAMES, shared
