"""plainness.py: what a reader of the code pays for, counted. tests/test_house.py holds the ceilings.

    python tests/plainness.py                # one row a file, and the sum of all files outside tests/
"""
import ast
import io
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT,
          tokenize.ENDMARKER}


def docstring_lines(tree):
    lines = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            lines.update(range(first.lineno, first.end_lineno + 1))
    return lines


def is_nested(node):
    children = [child for child in ast.walk(node) if child is not node]
    return len(node.generators) > 1 or any(isinstance(c, COMPREHENSIONS) for c in children)


def is_tuple_assignment(node):
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def count(source):
    """Name -> number, of one file. Comments and docstrings do not count as code."""
    tree = ast.parse(source)
    docs = docstring_lines(tree)
    code = 0
    for number, line in enumerate(source.splitlines(), 1):
        is_comment = line.strip().startswith("#")
        code += bool(line.strip()) and not is_comment and number not in docs
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        tokens += token.type not in LAYOUT and token.start[0] not in docs
    nodes = list(ast.walk(tree))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
    long = [f for f in functions if f.end_lineno - f.lineno >= 60 and f.name != "main"]
    crowded = [f for f in functions if len(f.args.args) + len(f.args.kwonlyargs) > 8]
    raised = [n.exc for n in nodes if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]
    return {
        "lines": len(source.splitlines()),
        "code": code,
        "tokens": tokens,
        "wide": sum(len(line) > 100 for line in source.splitlines()),
        "nested": sum(isinstance(n, COMPREHENSIONS) and is_nested(n) for n in nodes),
        "tuples": sum(is_tuple_assignment(n) for n in nodes),
        "walrus": sum(isinstance(n, ast.NamedExpr) for n in nodes),
        "long": len(long),
        "crowded": len([f for f in crowded if f.name != "forward"]),
        "refusals": sum(getattr(exc.func, "id", "") == "UserError" for exc in raised),
    }


def files():
    """Every Python file outside tests/ that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in sorted(set(names.split())) if not name.startswith("tests/")]
    return [ROOT / name for name in names if (ROOT / name).exists()]


def table():
    """{path from the root: counts} of every file."""
    return {str(file.relative_to(ROOT)): count(file.read_text()) for file in files()}


if __name__ == "__main__":
    rows = table()
    names = list(next(iter(rows.values())))
    print(f"{'file':26}" + "".join(f"{name:>9}" for name in names) + "    /line")
    rows["all"] = {name: sum(row[name] for row in rows.values()) for name in names}
    for file, row in rows.items():
        cells = "".join(f"{row[name]:9,}" for name in names)
        print(f"{file:26}{cells}{row['tokens'] / max(1, row['code']):9.1f}")
