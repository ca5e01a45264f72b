"""The size budgets of the house style, and what else must hold of every file."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE_LINES, FUNCTION_LINES, PARAMETERS, LINE_CHARS = 400, 40, 6, 100
OURS = ("aegaeon", "benchmark", "csrc", "tests")
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*suffixes: str) -> list[Path]:
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for name in OURS for path in (ROOT / name).rglob("*") if path.is_file()]
    return sorted(path for path in files if path.suffix in suffixes)


def python_functions(path: Path) -> Iterator[FunctionNode]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, FunctionNode):
            yield node


def parameter_count(function: FunctionNode) -> int:
    given = function.args
    names = [arg.arg for arg in given.posonlyargs + given.args + given.kwonlyargs]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def cpp_functions(text: str) -> Iterator[tuple[int, int]]:
    """Yield (first line, lines) of each outermost block that a parameter list precedes.

    A plain scan of braces: literals, comments and preprocessor lines are blanked out before.
    """
    kept_lines = re.compile(r"[^\n]")
    noise = re.compile(
        r'R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|(?<!\w)\'(?:\\.|[^\'\\\n])+\'|//[^\n]*|/\*.*?\*/'
        r"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*",
        re.DOTALL | re.MULTILINE,
    )
    text = noise.sub(lambda match: kept_lines.sub(" ", match[0]), text)
    no_function = re.compile(r"^(?:inline\s+)?(?:namespace|class|struct|union|enum|extern)\b")
    depth, inside, head, began = 0, 0, 0, 0
    for match in re.finditer(r"[{};]", text):
        label = r"^\s*(?:(?:public|private|protected):\s*)?"
        before = re.sub(label, "", text[head : match.start()])
        if match[0] == "{":
            depth += 1
            if not inside and "(" in before and not no_function.match(before):
                inside = depth
                began = match.start() - len(before)
        elif match[0] == "}":
            if inside == depth:
                yield text.count("\n", 0, began) + 1, text.count("\n", began, match.start()) + 1
                inside = 0
            depth -= 1
        head = match.end()


def test_no_file_is_over_the_budget():
    long_files = [
        f"{path}: {count} lines"
        for path in sources(".py", ".pyi", ".h", ".cpp", ".cu", ".txt")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > FILE_LINES
    ]
    assert long_files == []


def test_no_python_function_is_over_the_budget():
    long_functions = [
        f"{path}:{node.lineno} {node.name}: {lines} lines"
        for path in sources(".py")
        for node in python_functions(path)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    ]
    assert long_functions == []


def test_no_function_takes_more_parameters_than_the_budget():
    wide = [
        f"{path}:{node.lineno} {node.name}: {count} parameters"
        for path in sources(".py")
        if path.parts[len(ROOT.parts)] != "tests"
        for node in python_functions(path)
        if (count := parameter_count(node)) > PARAMETERS
    ]
    assert wide == []


def test_no_native_function_is_over_the_budget():
    long_functions = [
        f"{path}:{line}: {lines} lines"
        for path in sources(".h", ".cpp", ".cu")
        for line, lines in cpp_functions(path.read_text(encoding="utf-8"))
        if lines > FUNCTION_LINES
    ]
    assert long_functions == []


def test_no_native_line_is_too_long():
    long_lines = [
        f"{path}:{number}"
        for path in sources(".h", ".cpp", ".cu", ".txt")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > LINE_CHARS
    ]
    assert long_lines == []


def test_the_brace_scan_measures_functions():
    text = """
    #define BRACE {
    namespace a {
    struct S { int x{0}; char c = '{'; };
    // a comment with (a brace) {
    int f(int x) {
      if (x) { return 1; }
      auto g = [&](int y) {
        return y;
      };
      return g("}");
    }
    class C {
     public:
      explicit C(int x) : x_{x} {}
      int get() const { return x_; }
    };
    }  // namespace a
    """
    assert [lines for _, lines in cpp_functions(text)] == [7, 1, 1]


def test_nothing_names_a_path_of_somebodys_machine():
    alien = re.compile(r"""(?:^|[\s"'=(:])/(?:work|opt|root|home|Users|tmp/[a-z])(?:/|\b)""")
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in [
            *sources(".py", ".pyi", ".h", ".cpp", ".cu", ".txt", ".toml", ".md", ""),
            ROOT / ".ci" / "run",
        ]
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if alien.search(line)
    ]
    assert found == []


def test_each_dependency_has_its_reason_beside_it():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:requires|dependencies|\w+) = \[\n(.*?)^\]", text, re.M | re.S)
    one_liners = re.findall(r"^(?:gguf|test|check|bench) = \[.*\].*$", text, re.M)
    requirement = re.compile(r'"[A-Za-z][\w.-]*(?:[<>=!~;].*)?"')
    lines = [line for block in lists for line in block.splitlines()] + one_liners
    without = [line for line in lines if requirement.search(line) and "#" not in line]
    assert without == []
