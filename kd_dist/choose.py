"""A name and its options, as a recipe writes them, become a call. This is the only place that does it."""

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kd_dist.errors import RecipeError

SHOWN = 30  # names in a sentence


def hint(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a candidate is near `word`, otherwise `; known: ...`, cut where there are many."""
    names = sorted(candidates)
    near = nearest(word, names)
    if near is not None:
        return f"; did you mean '{near}'?"
    shown = names if len(names) <= SHOWN else [*names[:SHOWN], f"and {len(names) - SHOWN:,} more"]
    return f"; known: {', '.join(shown)}" if names else ""


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` may be a misspelling of; None where there is none."""
    return next(iter(difflib.get_close_matches(str(word), sorted(candidates), n=1, cutoff=0.6)), None)


def entry(table: Mapping[str, Any], kind: str, name: str) -> Any:
    """The row `name` of a literal table; an unknown name is a RecipeError with the nearest known one."""
    if name not in table:
        raise RecipeError(f"unknown {kind} '{name}'{hint(name, table)}")
    return table[name]


def imported(path: str) -> Callable[..., Any]:
    """The object that `package.module:factory` names, imported from the user's own code."""
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"'{path}': no module '{error.name}' can be imported; run from the folder that holds it, or install it"
        ) from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise RecipeError(f"'{path}': module '{module_name}' has no '{attribute}'{hint(attribute, public)}")
    if not callable(getattr(module, attribute)):
        raise RecipeError(f"'{path}': '{attribute}' is not a function or class that could be called")
    return getattr(module, attribute)


def check_options(
    function: Callable[..., Any], options: Mapping[str, Any], given: Iterable[str] = (), beside: Iterable[str] = ()
) -> None:
    """Raise a RecipeError unless `function(**options)` could be called.

    `given` names the parameters that the caller fills itself: a recipe may not set them and need not.
    `beside` names the options that the caller reads itself: a recipe may set them, the function does not see them.
    """
    given, beside = set(given), set(beside)
    free = {name: p for name, p in _parameters(function).items() if name not in given}
    named = {name: p for name, p in free.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in free.values())
    for name, value in options.items():
        if name in beside:
            continue
        if name in named:
            wanted = named[name].annotation
            if not fits(value, wanted):
                raise RecipeError(f"option '{name}' must be {describe(wanted)}, not {value!r}")
        elif name in given or not takes_any:
            raise RecipeError(f"unknown option '{name}'{hint(name, {*named, *beside})}")
    missing = [name for name, p in named.items() if p.default is p.empty and name not in options]
    if missing:
        raise RecipeError(f"option '{missing[0]}' is missing")


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """A function's or class's parameters, their annotations as types where those can be had."""
    try:
        return inspect.signature(function, eval_str=True).parameters
    except NameError:  # an annotation imported for type checkers only: left as text, which anything fits
        return inspect.signature(function).parameters


def fits(value: Any, wanted: Any) -> bool:
    """Whether a plain YAML value is of the annotated type. Types that YAML cannot write are let through."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if wanted in (tuple, list) or origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            return False
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return all(fits(one, arguments[0]) for one in value) if arguments else True
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted in (str, bool, dict, type(None)):
        return isinstance(value, wanted)
    return True


def describe(wanted: Any) -> str:
    """A type as a sentence says it."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(one) for one in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(one) for one in arguments)
    if origin in (tuple, list):
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return f"a list of {len(arguments)} ({', '.join(describe(one) for one in arguments)})"
        return f"a list, each {describe(arguments[0])}" if arguments else "a list"
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        list: "a list",
        tuple: "a list",
        dict: "a mapping",
        type(None): "null",
    }
    return names.get(wanted, getattr(wanted, "__name__", str(wanted)))
