"""Lines of code that fit into a terminal and a column of the site, broken as formatters break them."""

from __future__ import annotations

import ast
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator

WIDTH = 76

_CLOSING = {"(": ")", "[": "]", "{": "}"}


def fitted(code: str, width: int = WIDTH) -> str:
    """The same code with its long lines broken inside brackets; as it is where that cannot be done.

    Example:
        >>> print(fitted("model = Net(width=16, depth=2)", width=24))
        model = Net(
            width=16, depth=2
        )
    """
    lines = [line for whole in _logical(code) for line in _fit(whole, width)]
    text = "\n".join(lines)
    try:
        same = ast.dump(ast.parse(text)) == ast.dump(ast.parse(code))
    except SyntaxError:
        same = False
    return text if same else code


def wrapped(call: str, width: int = WIDTH) -> str:
    """How something is called, on as many lines as that takes.

    Example:
        >>> print(wrapped("Net(width=16, depth=2, *, dropout=0.5)", width=24))
        Net(width=16, depth=2,
            *, dropout=0.5)
    """
    return textwrap.fill(call, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _logical(code: str) -> Iterator[list[str]]:
    """The lines of each statement, or of each head of a block, in the order of the code."""
    lines, start = code.splitlines(), 0
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code + "\n").readline))
    except (tokenize.TokenError, IndentationError):
        yield from ([line] for line in lines)
        return
    for token in tokens:
        if token.type == tokenize.NEWLINE or (token.type == tokenize.NL and token.line.strip() == ""):
            yield lines[start : token.end[0]]
            start = token.end[0]
    if start < len(lines):
        yield lines[start:]


def _fit(lines: list[str], width: int) -> list[str]:
    if all(len(line) <= width for line in lines):
        return lines
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    joined = " ".join(line.strip() for line in lines)
    joined = re.sub(r"([(\[{]) ", r"\1", re.sub(r",? ([)\]}])", r"\1", joined)) if len(lines) > 1 else joined
    code, comment = _comment(joined)
    if imports := re.fullmatch(r"(from [\w.]+ import) (\w+(?:, \w+)*)", code):
        return [f"{imports[1]} (", *(f"    {name}," for name in imports[2].split(", ")), ")"]
    return [*([indent + comment] if comment else []), *_broken(code, indent, width)]


def _comment(line: str) -> tuple[str, str]:
    """A line without the comment at its end, and the comment."""
    for token in _tokens(line):
        if token.type == tokenize.COMMENT:
            return line[: token.start[1]].rstrip(), token.string
    return line, ""


def _tokens(line: str) -> list[tokenize.TokenInfo]:
    try:
        return list(tokenize.generate_tokens(io.StringIO(line + "\n").readline))
    except (tokenize.TokenError, IndentationError):
        return []


def _broken(line: str, indent: str, width: int) -> list[str]:
    """One line, broken at its last pair of brackets that holds something: its parts on one line or on one each."""
    if len(indent + line) <= width:
        return [indent + line]
    pairs = _pairs(line)
    if not pairs:
        return [indent + line]
    opened, closed = pairs[-1]
    if len(pairs) > 1 and len(indent) + opened + 1 > width:
        opened, closed = next((pair for pair in reversed(pairs) if len(indent) + pair[0] + 1 <= width), pairs[0])
    head, body, tail = line[: opened + 1], line[opened + 1 : closed].strip(), line[closed:]
    deeper = indent + "    "
    if len(deeper + body) <= width:
        inside = [deeper + body]
    else:
        if len(clauses := _clauses(body)) > 1:
            inside = [part for clause in clauses for part in _broken(clause, deeper, width)]
            return [indent + head, *inside, indent + tail]
        parts = _parts(body)
        # A lone part may be all there is to a call with one argument, a generator among them: no comma after it.
        end = "," if len(parts) > 1 and not any(part.startswith("*") for part in parts[-1:]) else ""
        inside = []
        for place, part in enumerate(parts):
            held = _broken(part, deeper, width - 1)  # a comma follows
            held[-1] += "," if place < len(parts) - 1 else end
            inside += held
    rest = _broken(tail, indent, width) if len(indent + tail) > width and len(tail) < len(line) else [indent + tail]
    return [indent + head, *inside, *rest]


def _pairs(line: str) -> list[tuple[int, int]]:
    """The places of the outermost brackets that hold something."""
    found, depth, start = list[tuple[int, int]](), 0, 0
    for token in _tokens(line):
        if token.type != tokenize.OP:
            continue
        if token.string in _CLOSING:
            start = token.start[1] if depth == 0 else start
            depth += 1
        elif token.string in _CLOSING.values():
            depth -= 1
            if depth == 0 and line[start + 1 : token.start[1]].strip():
                found.append((start, token.start[1]))
    return found


def _clauses(body: str) -> list[str]:
    """What a comprehension holds, and each `for` of it with its conditions."""
    places, depth = [0], 0
    for token in _tokens(f"({body})"):
        depth += (token.string in _CLOSING) - (token.string in _CLOSING.values())
        if token.string == "for" and depth == 1:
            places.append(token.start[1] - 1)
    return [body[start:end].strip() for start, end in zip(places, [*places[1:], len(body)], strict=True)]


def _parts(body: str) -> list[str]:
    """What stands between the outermost commas; a lambda's own arguments are not parted."""
    places, depth, lambdas = [-1], 0, 0
    for token in _tokens(f"({body})"):
        if token.string in _CLOSING:
            depth += 1
        elif token.string in _CLOSING.values():
            depth -= 1
        elif token.string == "lambda" and depth == 1:
            lambdas += 1
        elif token.string == ":" and depth == 1 and lambdas:
            lambdas -= 1
        elif token.string == "," and depth == 1 and not lambdas:
            places.append(token.start[1] - 1)
    ends = [*places[1:], len(body)]
    parts = [body[start + 1 : end].strip() for start, end in zip(places, ends, strict=True)]
    return [part for part in parts if part]
