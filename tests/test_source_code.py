"""The code of a source file: an edit of comments, docstrings and blank lines keeps it, an edit of anything else changes
it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from workbench.source_code import code

FOLDER = Path(__file__).parents[1]

CUDA = r"""
#define TWICE(x) \
    ((x) + (x))
constexpr int kBig = 1'000'000;
const char* kName = "no // comment \" /* here */";
const char kQuote = '"', kApostrophe = u8'\'';
const char* kSource = R"ptx(
// kept
)ptx";
__device__ int f(int a) {
    return a / kBig;
}
"""

PYTHON = '''
def f(x, name="no # comment"):
    """What it does.

    # Not code.
    """
    text = """kept.

    # kept
    """
    if x:
        return f"{x:#x} # {name!r}", (
            1,
            "é",
        )
    return x + text


number: int = 3
"""What it stands for."""
'''


def written(folder: Path, suffix: str, content: str | bytes) -> bytes:
    path = folder / f"source{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return code(path)


@pytest.mark.parametrize(
    ("suffix", "content", "old", "new"),
    [
        (".cu", CUDA, "\n#define", "// Head.\n\n/* of two\n   lines */\n#define"),
        (".cu", CUDA, "((x) + (x))", "((x) /* once */ + (x))  \t"),
        (".cu", CUDA, "1'000'000;", "1'000'000;  // isn't '1' /*"),
        (".cuh", CUDA, "kBig;\n", 'kBig;  // "by" \\\n spliced \\\r\n on\n'),
        (".cu", CUDA, "\n}", "\n\n  }\n\n"),
        (".cu", CUDA, "\n", "\r\n"),
        (".py", PYTHON, "\ndef", "# Head.\n\n\ndef"),
        (".py", PYTHON, "    if x:", '\n    # Why.\n# Here.\n    if x:  # so """'),
        (".py", PYTHON, '"é",', '"é",  # é # twice \n'),
        (".py", PYTHON, "    return x + text\n", "    return x + text  # last\n"),
        (".py", PYTHON, 'for."""\n', 'for."""'),
        (".py", PYTHON, "    return x + text\n", "    return x + text \n\n\n"),
        (".py", PYTHON, "\n", "\r\n"),
        (".py", PYTHON, "    # Not code.\n", ""),
        (".py", PYTHON, '    """What it does.\n\n    # Not code.\n    """\n', ""),
        (".py", PYTHON, '"""What it stands for."""\n', ""),
        (".py", PYTHON, "\ndef", '"""Head.\n\nOf the file."""\n\ndef'),
    ],
)
def test_comments_docstrings_and_blank_lines_do_not_count(
    tmp_path: Path, suffix: str, content: str, old: str, new: str
) -> None:
    edited = content.replace(old, new)
    assert edited != content
    if new == "\r\n" and suffix == ".cu":  # in a raw string a line break is content
        content, edited = (text.partition("const char* kSource")[0] for text in (content, edited))
    assert written(tmp_path, suffix, edited) == written(tmp_path, suffix, content)


@pytest.mark.parametrize(
    ("suffix", "content", "old", "new"),
    [
        (".cu", CUDA, "no // comment", "no // remark"),
        (".cu", CUDA, "/* here */", "/* there */"),
        (".cu", CUDA, "// kept", "// left"),
        (".cu", CUDA, "// kept", "// kept "),
        (".cu", CUDA, "// kept", "// kept\n"),
        (".cu", CUDA, "TWICE(x)", "TWICE (x)"),
        (".cu", CUDA, " \\\n    ((x)", "\n    ((x)"),
        (".cu", CUDA, "a / kBig", "a // kBig"),
        (".cu", CUDA, "a / kBig", "a % kBig"),
        (".cu", CUDA, "return a", "/* return a"),
        (".py", PYTHON, "no # comment", "no # remark"),
        (".py", PYTHON, "    # kept", "    # left"),
        (".py", PYTHON, "    # kept", "    # kept "),
        (".py", PYTHON, "kept.\n", "kept."),
        (".py", PYTHON, "= 3", "= 3; 4"),
        (".py", PYTHON, "#x}", "#o}"),
        (".py", PYTHON, "# {name", "#{name"),
        (".py", PYTHON, "    return x", "return x"),
        (".py", PYTHON, "        return f", "        # return f"),
        (".py", PYTHON, "if x:", "if not x:"),
        (".txt", "a  # b", "b", "c"),
    ],
)
def test_anything_else_counts(tmp_path: Path, suffix: str, content: str, old: str, new: str) -> None:
    edited = content.replace(old, new)
    assert edited != content
    assert written(tmp_path, suffix, edited) != written(tmp_path, suffix, content)


def test_the_code_is_the_same_under_every_version_of_python(tmp_path: Path) -> None:
    """In later ones an f-string is many tokens, of which this one's are a comment's and a blank line's."""
    content = 'a = f"""{\n    b =  # no comment before Python 3.12\n\n}"""  # one\n\nc = 1  # two\n'
    assert written(tmp_path, ".py", content) == content.replace("  # one\n", "").replace("  # two", "").encode()


def test_the_encoding_that_a_comment_names_counts(tmp_path: Path) -> None:
    latin, utf_8 = "# coding: latin-1\na = 'é'\n", "# coding: utf-8\na = 'é'\n"
    assert written(tmp_path, ".py", latin.encode("latin-1")) == written(tmp_path, ".py", utf_8)
    assert written(tmp_path, ".py", latin.encode()) != written(tmp_path, ".py", utf_8)


@pytest.mark.parametrize(
    "content",
    [
        b"a = (  # open\n",
        b"a = '''  # open\n",
        b"if a:\n        b\n    c  # dedent\n",
        b"\xff  # x\n",
    ],
)
def test_python_that_cannot_be_tokenized_is_taken_as_it_is(tmp_path: Path, content: bytes) -> None:
    assert written(tmp_path, ".py", content) == content


def without_docstrings(source: bytes) -> ast.Module:
    def is_docstring(node: ast.AST) -> bool:
        return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)

    module = ast.parse(source)
    for node in ast.walk(module):
        for name in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(node, name, None), list):
                left = [one for one in statements if not is_docstring(one)]
                setattr(node, name, left if left or node is module else statements)
    return module


def test_the_code_of_the_kernels_is_the_same_program(tmp_path: Path) -> None:
    for path in FOLDER.glob("kernels_*/*.py"):
        found = code(path)
        assert ast.dump(ast.parse(found)) == ast.dump(without_docstrings(path.read_bytes()))
        assert not any(line.lstrip().startswith(b"# ") for line in found.splitlines())
    for path in FOLDER.glob("kernels_cuda/**/*.cu*"):
        found = code(path)
        assert b"//" not in found
        assert written(tmp_path, path.suffix, found) == found
