"""Every path, command and name that the documents say exists, and the README's Python runs.

Blocks fenced as `python` in README.md are executed in order, together, in an empty folder; blocks fenced as `py` (the
user's own data, a GPU) are only parsed and their wrn_fast names looked up.
"""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
SUFFIXES = "py|pyi|cpp|h|cu|cuh|md|json|toml|png|sh|in|txt"
# Where a path in a document may start, and paths that only exist after a command or on the reader's machine.
FOLDERS = ("csrc", "wrn_fast", "tests", "benchmarks", "docs", "faults", ".ci")
MADE_LATER = re.compile(
    r"build/|\.venv|_build_reasons\.txt|\.so$|CIFAR|SVHN|\.pt$|^path/|results?\.(json|png)$|demo.*\.png$|results/battery-"
)


def fences(document):
    """(language, text) of each fenced block."""
    text = document.read_text(encoding="utf-8")
    return [(m[1].strip(), m[2]) for m in re.finditer(r"^```([^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def commands(document):
    """The shell commands of a document: lines of shell blocks and inline code that starts as one."""
    lines = []
    for language, text in fences(document):
        if language in ("bash", "sh", "shell", "console"):
            lines += text.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines += [code for code in re.findall(r"`([^`\n]+)`", prose) if re.match(r"(make|wrn-fast|python3? -m) ", code)]
    for line in lines:
        line = re.sub(r"^\s*\$ ", "", line).split(" #")[0].strip()
        for part in re.split(r"&&|;", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def paths(text):
    """Words of a text that look like files of this repository."""
    for word in re.findall(rf"(?<![\w./:-])[\w.*{{}},-]+(?:/[\w.*{{}},-]+)*\.(?:{SUFFIXES})(?![\w/])", text):
        yield word
    for word in re.findall(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*{{}}-]*", text):
        yield word.rstrip(".")


def exists(word, beside):
    """Does the path (`*`, `{a,b}` allowed) exist from the root, the package, csrc or `beside`; a bare name anywhere?"""
    braces = re.search(r"\{([^{}]*)\}", word)
    if braces:
        parts = braces[1].split(",")
        return all(exists(word[: braces.start()] + part + word[braces.end() :], beside) for part in parts)
    if any(True for base in {ROOT, ROOT / "wrn_fast", ROOT / "csrc", beside} for _ in base.glob(word)):
        return True
    return "/" not in word and any(True for folder in FOLDERS for _ in (ROOT / folder).rglob(word))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_and_links_exist(document):
    text = document.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    words = [word for span in spans for word in paths(span)] + [link for link in links if link]
    missing = {w for w in words if not MADE_LATER.search(w) and "<" not in w and not exists(w, document.parent)}
    assert not missing, f"{document.name} names what does not exist: {sorted(missing)}"


def test_paths_in_comments_exist():
    """A comment or docstring that names a file by its folder is true."""
    missing = []
    for folder in ("wrn_fast", "csrc", "benchmarks", "tests"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix not in (".py", ".cpp", ".h", ".cu", ".cuh") or file.name in (
                Path(__file__).name,
                "test_packaging.py",
            ):
                continue
            pattern = rf"(?<![\w./-])(?:csrc|tests|benchmarks|docs|wrn_fast)/[\w/*{{}},-]+\.(?:{SUFFIXES})\b"
            for word in re.findall(pattern, file.read_text(encoding="utf-8")):
                if not MADE_LATER.search(word) and not exists(word, file.parent):
                    missing.append(f"{file.relative_to(ROOT)}: {word}")
    assert not missing, missing


def make_targets():
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_make_alone_says_what_there_is():
    """`make` and `make help` build nothing; every target but `help` itself is listed."""
    for words in ([], ["help"]):
        said = subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert said.returncode == 0, said.stderr
        assert set(re.findall(r"\bmake ([a-z][\w-]*)", said.stdout)) == make_targets()


def extras():
    block = re.search(
        r"^\[project\.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    return set(re.findall(r"^(\w+) = \[", block[1], re.MULTILINE))


def command_help(*words):
    """The text of `--help` of a command given as `python -m` words."""
    result = subprocess.run(
        [sys.executable, "-m", *words, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, f"{' '.join(words)} --help: {result.stderr[-2000:]}"
    return result.stdout


_help = {}


def check_options(module, words):
    """The subcommand and each --option of a command line occur in its --help."""
    key = (module, *([words[0]] if words and re.fullmatch(r"[a-z]+", words[0]) and module == "wrn_fast.cli" else []))
    if key not in _help:
        _help[key] = command_help(*key)
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{re.escape(word.split('=')[0])}\b", _help[key]), f"{' '.join(key)} has no {word}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document):
    for words in commands(document):
        if words[0] == "make":
            for word in words[1:]:
                if re.fullmatch(r"[a-z][\w-]*", word):
                    assert word in make_targets(), f"no target: make {word}"
                elif "=" in word and not word.startswith("-"):
                    name = word.split("=")[0]
                    assert re.search(rf"^{name} \?=", (ROOT / "Makefile").read_text(), re.M), f"make has no {name}"
        elif words[0] in ("python", "python3") and words[1:2] == ["-m"]:
            if words[2] in ("pip", "venv", "pytest"):
                continue
            check_options(words[2], words[3:]) if importlib.util.find_spec(words[2].split(".")[0]) else pytest.fail(
                str(words)
            )
        elif words[0] in ("python", "python3") and words[1:2] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"no file {words[1]}"
        elif words[0] == "wrn-fast":
            check_options("wrn_fast.cli", words[1:])
        if "pip" in words and "install" in words:
            for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
                assert set(extra.split(",")) <= extras(), f"no such extra: {extra}"


def test_environment_variables_exist():
    """WRN_FAST_* that a document names is read somewhere."""
    code = "".join(
        p.read_text() for d in ("wrn_fast", "csrc") for p in (ROOT / d).rglob("*") if p.suffix in (".py", ".cpp", ".h")
    )
    code += (ROOT / "setup.py").read_text()
    for document in DOCUMENTS:
        for name in set(re.findall(r"\bWRN_FAST_[A-Z_]+\b", document.read_text(encoding="utf-8"))):
            assert name in code, f"{document.name}: nothing reads {name}"


def python_blocks(*languages):
    return [text for path in DOCUMENTS for language, text in fences(path) if language in languages]


def test_python_blocks_parse_and_their_names_exist():
    import wrn_fast

    for text in python_blocks("python", "py"):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "wrn_fast":
                known = hasattr(wrn_fast, node.attr) or importlib.util.find_spec(f"wrn_fast.{node.attr}")
                assert known, f"wrn_fast.{node.attr} does not exist"
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "wrn_fast":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_readme_runs(tmp_path):
    blocks = [text for language, text in fences(ROOT / "README.md") if language == "python"]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def test_ci_runs_the_readmes_test_command():
    text = (ROOT / ".ci" / "run").read_text()
    assert text.splitlines()[-1] == "make test" and "set -euo pipefail" in text
    assert ["make", "test"] in list(commands(ROOT / "README.md")) and ["make", "demo"] in list(
        commands(ROOT / "README.md")
    )
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
