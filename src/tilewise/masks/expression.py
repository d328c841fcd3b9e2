"""The expression language of masks: `causal & (window(256, 0) | global([0, 5]))`.

`str(mask)` writes it and `parse` reads it back; it is what crosses the `torch.library` boundary, where no Python object
may. A recursive-descent parser over a closed list of names, with no `eval`:

    mask     = both { "|" both }
    both     = unary { "&" unary }
    unary    = "~" unary | "(" mask ")" | name [ "(" [ argument { "," argument } ] ")" ]
    argument = [ name "=" ] ( integer | "none" | "true" | "false" | list | "$" digits | mask )
    list     = "[" [ item { "," item } ] "]"        item = integer | integer ":" integer   (half-open)
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from tilewise.masks.algebra import Mask, PerHead
from tilewise.masks.patterns import Causal, Dilated, Prefix, Strided, Tree, Window
from tilewise.masks.sets import BigBird, Dense, Documents, Global, Longformer, Random, RandomTokens
from tilewise.masks.tiles import FromTiles


def _per_head(*masks: Mask) -> Mask:
    return PerHead(masks)


NAMES: dict[str, Callable[..., Mask]] = {
    "causal": Causal,
    "window": Window,
    "dilated": Dilated,
    "strided": Strided,
    "global": Global,
    "random": Random,
    "random_tokens": RandomTokens,
    "documents": Documents,
    "prefix": Prefix,
    "tree": Tree,
    "dense": Dense,
    "longformer": Longformer,
    "bigbird": BigBird,
    "tiles": FromTiles,
    "per_head": _per_head,
}
"""Every name of the language, and what makes its mask."""

_CONSTANTS = {"none": None, "true": True, "false": False}
_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)|(?P<int>-?\d+)|\$(?P<array>\d+)|(?P<sign>[()\[\],:=&|~]))")
_DEEPEST = 100
_LONGEST_RANGE = 1 << 24


class ExpressionError(ValueError):
    """A mask expression that does not parse, or whose values are wrong; `position` is where, from 0."""

    def __init__(self, text: str, position: int, problem: str) -> None:
        line = " ".join(text.splitlines()) if text else ""
        super().__init__(f"mask expression: {problem}\n  {line}\n  {' ' * position}^")
        self.text = text
        self.position = position
        self.problem = problem


class _Token(NamedTuple):
    kind: str
    value: str
    position: int


class _Call(NamedTuple):
    name: str
    position: int
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]


class _Operator(NamedTuple):
    sign: str
    position: int
    operands: tuple[Any, ...]


class _Array(NamedTuple):
    number: int
    position: int


def parse(text: str, tensors: Sequence[Any] = ()) -> Mask:
    """The mask that `text` describes; `$k` stands for `tensors[k]`, an array or a torch tensor.

    Raises:
        ExpressionError: (a ValueError) with the text and a caret under the place.
        TypeError, ValueError: what the arrays themselves do wrong, as the mask's constructor says it.
    """
    tree, arrays = _read(text)
    if not arrays:
        return _without_arrays(text)
    return _build(tree, text, tensors)


@lru_cache(maxsize=512)
def _without_arrays(text: str) -> Mask:
    return _build(_read(text)[0], text, ())


@lru_cache(maxsize=512)
def _read(text: str) -> tuple[Any, bool]:
    """The syntax tree of `text`, and whether it has placeholders."""
    reader = _Reader(text)
    tree = reader.mask(0)
    if reader.token.kind:
        reader.fail("expected `&`, `|` or the end")
    return tree, reader.arrays


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.end = 0
        self.arrays = False
        self.token = self._next()

    def _next(self) -> _Token:
        match = _TOKEN.match(self.text, self.end)
        if match is None or match.lastgroup is None:
            rest = self.text[self.end :]
            at = self.end + len(rest) - len(rest.lstrip())
            if rest.strip():
                raise ExpressionError(self.text, at, f"unexpected {self.text[at]!r}")
            return _Token("", "", len(self.text.rstrip()))
        self.end = match.end()
        kind = match.lastgroup
        start = match.start(kind) - (kind == "array")
        return _Token(match[kind] if kind == "sign" else kind, match[kind], start)

    def fail(self, problem: str) -> NoReturn:
        found = f"found {self.token.value!r}" if self.token.kind else "the text ends here"
        raise ExpressionError(self.text, self.token.position, f"{problem}, {found}")

    def take(self) -> _Token:
        taken, self.token = self.token, self._next()
        return taken

    def skip(self, kind: str) -> bool:
        found = self.token.kind == kind
        if found:
            self.take()
        return found

    def expect(self, kind: str) -> None:
        if not self.skip(kind):
            self.fail(f"expected `{kind}`")

    def mask(self, depth: int) -> Any:
        if depth > _DEEPEST:
            self.fail(f"more than {_DEEPEST} levels of parentheses")
        return self._chain("|", lambda: self._chain("&", lambda: self.unary(depth)))

    def _chain(self, sign: str, operand: Callable[[], Any]) -> Any:
        position = self.token.position
        operands = [operand()]
        while self.skip(sign):
            operands.append(operand())
        return operands[0] if len(operands) == 1 else _Operator(sign, position, tuple(operands))

    def unary(self, depth: int) -> Any:
        flips = 0
        position = self.token.position
        while self.skip("~"):
            flips += 1
        if self.skip("("):
            inner = self.mask(depth + 1)
            self.expect(")")
        elif self.token.kind == "name":
            inner = self.call(depth)
        else:
            self.fail("expected a mask")
        return _Operator("~", position, (inner,)) if flips % 2 else inner

    def call(self, depth: int) -> _Call:
        _, name, position = self.take()
        if name not in NAMES:
            close = difflib.get_close_matches(name.lower(), NAMES, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(NAMES)}"
            raise ExpressionError(self.text, position, f"unknown mask `{name}`; {hint}")
        arguments: list[Any] = []
        keywords: dict[str, Any] = {}
        if self.skip("("):
            while self.token.kind != ")":
                self.argument(depth, arguments, keywords)
                if not self.skip(","):
                    break
            self.expect(")")
        signature = inspect.signature(NAMES[name])
        try:
            signature.bind(*arguments, **keywords)
        except TypeError as error:
            wanted = ", ".join(str(parameter).split(":")[0] for parameter in signature.parameters.values())
            raise ExpressionError(self.text, position, f"{error} in {name}({wanted})") from error
        return _Call(name, position, tuple(arguments), tuple(keywords.items()))

    def argument(self, depth: int, arguments: list[Any], keywords: dict[str, Any]) -> None:
        before, end = self.token, self.end
        if self.skip("name") and self.skip("="):
            if before.value in keywords:
                raise ExpressionError(self.text, before.position, f"`{before.value}` is given twice")
            keywords[before.value] = self.value(depth)
            return
        self.token, self.end = before, end
        if keywords:
            self.fail("expected `name=value` after the first of them")
        arguments.append(self.value(depth))

    def value(self, depth: int) -> Any:
        if self.token.kind == "int":
            return int(self.take().value)
        if self.token.kind == "array":
            self.arrays = True
            taken = self.take()
            return _Array(int(taken.value), taken.position)
        if self.token.kind == "name" and self.token.value.lower() in _CONSTANTS:
            return _CONSTANTS[self.take().value.lower()]
        if self.skip("["):
            items: list[int] = []
            while self.token.kind != "]":
                items.extend(self.item())
                if not self.skip(","):
                    break
            self.expect("]")
            return tuple(items)
        if self.token.kind not in ("name", "~", "("):
            self.fail("expected a number, a list, $k or a mask")
        return self.mask(depth + 1)

    def item(self) -> Sequence[int]:
        first = self.integer()
        if not self.skip(":"):
            return (first,)
        at = self.token.position
        stop = self.integer()
        if stop - first > _LONGEST_RANGE:
            raise ExpressionError(self.text, at, f"a range of more than {_LONGEST_RANGE:,} numbers")
        return range(first, stop)

    def integer(self) -> int:
        if self.token.kind != "int":
            self.fail("expected a number")
        return int(self.take().value)


def _build(node: Any, text: str, tensors: Sequence[Any]) -> Any:
    if isinstance(node, _Operator):
        masks = [_build(operand, text, tensors) for operand in node.operands]
        try:
            whole = ~masks[0] if node.sign == "~" else masks[0]
            for mask in masks[1:]:
                whole = whole & mask if node.sign == "&" else whole | mask
        except ValueError as error:
            raise ExpressionError(text, node.position, str(error)) from error
        return whole
    if isinstance(node, _Array):
        if node.number >= len(tensors):
            raise ExpressionError(text, node.position, f"${node.number} with {len(tensors)} arrays given")
        return tensors[node.number]
    if not isinstance(node, _Call):
        return node
    make = NAMES[node.name]
    arguments = [_build(argument, text, tensors) for argument in node.arguments]
    keywords = {name: _build(value, text, tensors) for name, value in node.keywords}
    try:
        return make(*arguments, **keywords)
    except (TypeError, ValueError) as error:
        if any(isinstance(value, _Array) for value in (*node.arguments, *dict(node.keywords).values())):
            raise
        raise ExpressionError(text, node.position, str(error)) from error
