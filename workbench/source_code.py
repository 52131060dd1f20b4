"""What of a source file can change a result: its code, without comments, docstrings, blank lines and trailing white
space.

Measurements are keyed by it (environment.sources_digest), so that they outlive an edit of a comment. Compiled kernels
are kept by the whole text (kernels_cuda/compile.py), since they hold line numbers. A program may read its docstrings,
but these that compute and time do not.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

_CUDA_COMMENT = rb"//(?:\\\r?\n|[^\n])*|/\*.*?\*/"
_CUDA = re.compile(
    rb"""
      (?P<gap> (?: \s | %s )+ )
    | (?: u8 | [uUL] )? R"(?P<delimiter> [^()\\\s]* )\( .*? \)(?P=delimiter)"
    | "(?: \\. | [^"\\\n] )*" | '(?: \\. | [^'\\\n] )*'
    | [^\W\d]\w* | \d (?: '?[\w.] )*  # a name, or a number, in which ' begins no literal
    """
    % _CUDA_COMMENT,
    re.DOTALL | re.VERBOSE,
)
_CUDA_COMMENTS = re.compile(_CUDA_COMMENT, re.DOTALL)


def code(path: Path) -> bytes:
    """The code of a CUDA (.cu, .cuh) or Python source file, equal for files that differ in comments, docstrings and
    blank lines.

    It is made to be compared or hashed, and the same under every version of Python. A file of another kind, or one
    that Python cannot tokenize, is returned as it is.
    """
    if path.suffix == ".py":
        return _python_code(path)
    content = path.read_bytes()
    return _cuda_code(content) if path.suffix in (".cu", ".cuh") else content


def _cuda_code(content: bytes) -> bytes:
    """With each gap between tokens, of white space and comments, as one line break, or one space if it has none."""

    def shortened(token: re.Match[bytes]) -> bytes:
        gap: bytes | None = token["gap"]
        if gap is None:
            return token[0]
        return b"\n" if b"\n" in _CUDA_COMMENTS.sub(b"", gap) else b" "

    return _CUDA.sub(shortened, content).strip()


def _python_code(path: Path) -> bytes:
    """With each line cut where its code ends, unless it ends inside a string, and empty ones left out."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return path.read_bytes()
    ends: dict[int, int | None] = {}  # by line, from 1; None where nothing but white space follows the code
    depth = 0  # in f-strings, which before Python 3.12 are one token each
    for token in tokens:
        kind = tokenize.tok_name[token.type]
        depth += kind.endswith("STRING_START") - kind.endswith("STRING_END")
        if depth == 0 and kind in ("COMMENT", "NEWLINE", "NL"):
            ends.setdefault(token.start[0], token.start[1] if kind == "COMMENT" else None)
    for token in _docstrings(tokens):
        ends |= dict.fromkeys(range(token.start[0], token.end[0] + 1), 0)
    lines = []
    for row, line in enumerate(io.StringIO(text), start=1):
        if row not in ends:
            lines.append(line)
        elif kept := line[: ends[row]].rstrip():
            lines.append(kept + "\n")
    return "".join(lines).encode()


def _docstrings(tokens: Iterable[tokenize.TokenInfo]) -> Iterator[tokenize.TokenInfo]:
    """The strings that are a statement each, of modules, classes, functions and attributes; not one that is all there
    is of a block."""
    kept = [token for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    starts = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)  # of a statement, when they come before it
    for before, token, end, after in zip([None, *kept], kept, kept[1:], [*kept[2:], None], strict=False):
        if token.type != tokenize.STRING or end.type != tokenize.NEWLINE:
            continue
        is_statement = before is None or before.type in starts
        is_block = before is not None and before.type == tokenize.INDENT and after and after.type == tokenize.DEDENT
        if is_statement and not is_block:
            yield token
