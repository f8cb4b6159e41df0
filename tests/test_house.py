"""The house is in order: imports run one way, files and functions have a size that one can read, libraries are named.

pipeline/ <- helper_functions.py <- the training scripts
pipeline/ <- compare_runs.py <- study.py, which also takes the LoRA script's list of flags to check a plan
"""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
from conftest import PROJECT

# What each module at the root may import of the project, beside pipeline/.
ABOVE_PIPELINE = {
    "helper_functions": set(),
    "tweet_qa_main": {"helper_functions"},
    "merge_adapter": {"helper_functions", "tweet_qa_main"},
    "tweet_qa_main_lora": {"helper_functions", "tweet_qa_main", "merge_adapter"},
    "compare_runs": set(),
    "study": {"compare_runs", "tweet_qa_main_lora"},
}
LONGEST_FILE, SHORTEST_FILE, LONGEST_FUNCTION = 600, 25, 80


def tracked(*patterns):
    """The project's files that git knows or would add, by their names; all files where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return [PROJECT / name for name in listed.stdout.splitlines() if (PROJECT / name).exists()]


FILES = [path for path in PROJECT.rglob("*.py") if not set(path.relative_to(PROJECT).parts) & {".venv", "tests"}]


def module_name(path):
    """How the file is imported: pipeline.data, compare_runs."""
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """The modules that a file imports anywhere in it, in functions too, with the names that it takes of them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own_imports(path):
    """Those of the project's own modules that a file imports."""
    own = {module_name(each) for each in FILES} - {"pipeline", module_name(path)}
    return {name for name in imports(path) if name in own}


def test_imports_run_one_way():
    wrong = []
    for path in FILES:
        name, imported = module_name(path), own_imports(path)
        if name.startswith("pipeline"):
            forbidden = {each for each in imported if not each.startswith("pipeline.")}
        elif "." not in name:
            allowed = ABOVE_PIPELINE.get(name, set())
            forbidden = {each for each in imported - allowed if not each.startswith("pipeline.")}
        else:  # demo/, benchmarks/ stand on everything else
            forbidden = set()
        wrong += [f"{path.relative_to(PROJECT)} imports {each}" for each in sorted(forbidden)]
    assert not wrong, wrong


def test_no_imports_go_in_a_circle():
    waiting = {module_name(path): own_imports(path) for path in FILES}
    while ready := {name for name, imported in waiting.items() if not imported & waiting.keys()}:
        waiting = {name: imported for name, imported in waiting.items() if name not in ready}
    circle = {name: sorted(imported & waiting.keys()) for name, imported in waiting.items()}
    assert not circle, f"these import each other, or what imports each other: {circle}"


def test_files_have_a_size_that_one_can_read():
    lengths = {
        str(path.relative_to(PROJECT)): len(path.read_text().splitlines())
        for path in tracked("*.py")
        if path.relative_to(PROJECT).parts[0] != "tests"
    }
    assert len(lengths) > 20
    small = {name for name, lines in lengths.items() if lines < SHORTEST_FILE} - {"pipeline/__init__.py"}
    large = {name for name, lines in lengths.items() if lines > LONGEST_FILE}
    assert not small and not large, {name: lengths[name] for name in small | large}


def test_functions_have_a_size_that_one_can_read():
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long[f"{path.relative_to(PROJECT)}: {node.name}"] = lines
    assert not long


def test_the_lora_script_shows_the_adapter_and_nothing_else():
    text = (PROJECT / "tweet_qa_main_lora.py").read_text()
    assert len(text.splitlines()) <= 75
    assert re.findall(r"^(?:def|class) (\w+)", text, flags=re.MULTILINE) == ["main", "add_lora"]


# ---------------------------------------------------------------------------------------------------- requirements


def required(*files):
    """The names of the distributions that requirements files ask for, in lower case with dashes."""
    names = set()
    for file in files:
        for line in (PROJECT / file).read_text().splitlines():
            if name := re.match(r"[\w.-]+", line):
                names.add(name[0].lower().replace("_", "-"))
    return names


OPTIONAL = {"wandb", "trackio"}  # --report_to names the one that is missing
PLACES = {  # where code stands, and the files that name what it may import
    "": ["requirements.txt"],
    "pipeline": ["requirements.txt"],
    "demo": ["requirements.txt", "demo/requirements.txt"],
    "benchmarks": ["requirements.txt", "demo/requirements.txt", "requirements-dev.txt", "benchmarks/requirements.txt"],
    "tests": ["requirements.txt", "demo/requirements.txt", "requirements-dev.txt"],
}


@pytest.mark.parametrize("place", PLACES)
def test_every_library_that_is_imported_is_required_by_name(place):
    own = {module_name(path).split(".")[0] for path in FILES} | {path.stem for path in (PROJECT / "tests").glob("*.py")}
    own |= {path.stem for path in (PROJECT / "demo").glob("*.py")}
    distributions, known = packages_distributions(), required(*PLACES[place])
    missing = {}
    for path in (PROJECT / place).glob("*.py"):
        for name in {each.split(".")[0] for each in imports(path)} - own - sys.stdlib_module_names - OPTIONAL:
            given = {each.lower().replace("_", "-") for each in distributions.get(name, [name])}
            if not given & known:
                missing.setdefault(name, []).append(path.name)
    assert not missing


def test_requirements_give_ranges_and_the_constraints_exact_versions():
    for line in (PROJECT / "requirements.txt").read_text().splitlines():
        assert re.fullmatch(r"#.*|[\w-]+>=[\d.]+(,<\d+)?( #.*)?", line), line
    exact = r"#.*|-r \S+|[\w-]+==[\w.]+( #.*)?"
    for name in (
        "constraints",
        "demo/requirements",
        "requirements-dev",
        "tests/requirements-transformers4",
        "benchmarks/requirements",
    ):
        for line in (PROJECT / f"{name}.txt").read_text().splitlines():
            assert re.fullmatch(exact, line), (name, line)
    assert required("requirements.txt") <= required("constraints.txt")
