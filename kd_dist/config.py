"""A recipe file and the overrides of a command line become a checked `Recipe`, or one sentence that says what is wrong.

Plain YAML and nothing else: no tags, no merge keys, no key twice. A plain scalar is read by the type of its key;
where the type is free, numbers (`3e-4` among them), `true`, `false` and `null` mean themselves and all else is text.
"""

import dataclasses
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kd_dist.checkpoint import BEST, RESULT, best_digest, read_record
from kd_dist.choose import describe, fits, hint
from kd_dist.errors import RecipeError, TrainingError
from kd_dist.manifest import first_difference
from kd_dist.recipe import Network, Recipe
from kd_dist.rules import Keys, Problems, problems
from kd_dist.tasks import TASKS

Place = Callable[[int], str]  # a line number, from 1, to what an error begins with

COMMAND_LINE = "command line"
INTEGER = re.compile(r"[-+]?[0-9]{1,18}")  # 18 digits fit 64 bits; a longer one is read as a float
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "Null": None, "~": None, "": None}


def load(path: str | Path, overrides: Sequence[str] = (), stage: str | None = None) -> Recipe:
    """The recipe in the file `path`, read and checked before anything is built.

    `overrides` are `section.key=value` with the value in YAML; they replace or add keys. With `stage` given, that stage
    must exist and the prefix `train.` stands for `stages.<stage>.`. Everything wrong is a RecipeError that begins with
    `<path>:<line>: ` or `command line: `, and with the keys that lead to the place.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error.reason})"
        raise RecipeError(f"{path}: the recipe cannot be read: {reason}") from error
    root = _parse(text, lambda line: f"{path}:{line}", ())
    if stage is not None:
        _check_stage(root, stage)
    for override in overrides:
        root = _overridden(root, override, stage)
    root, trained_for = _with_runs(root)
    recipe = _build(root, Recipe, ())
    if recipe.name is None:
        recipe = dataclasses.replace(recipe, name=Path(path).stem)
    if recipe.evaluate.metric is None:
        first, *_ = TASKS[recipe.task.name].metrics_known
        recipe = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, metric=first))
    if recipe.cache.logits is None:
        exact = "fp32" if recipe.task.name == "regression" else "fp16"
        recipe = dataclasses.replace(recipe, cache=dataclasses.replace(recipe.cache, logits=exact))
    for keys, sentence in [*_run_problems(recipe, trained_for), *problems(recipe)]:
        raise _error(_where(root, keys), keys, sentence)
    return recipe


def to_dict(recipe: Any) -> Any:
    """A recipe, or any section of one, as dicts, lists and scalars: equal to itself after a trip through JSON."""
    if dataclasses.is_dataclass(recipe):
        return {field.name: to_dict(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}
    if isinstance(recipe, dict):
        return {key: to_dict(value) for key, value in recipe.items()}
    if isinstance(recipe, (list, tuple)):
        return [to_dict(value) for value in recipe]
    return recipe


def checked(values: dict[str, Any], cls: type, where: str) -> Any:
    """Plain values as the dataclass `cls`, checked as a section of a recipe is. A RecipeError begins with `where`."""
    return _build(_as_node(values, where), cls, ())


# ---------------------------------------------------------------------------------------------- text to nodes


class _Node(NamedTuple):
    """A value of the file, and where it was written."""

    value: Any  # dict of _Node, list of _Node, or a scalar
    text: str | None  # a plain scalar as written; None for all else
    where: str  # "configs/pets.yaml:14" or "command line"


def _error(where: str, keys: Keys, sentence: str) -> RecipeError:
    return RecipeError(": ".join(filter(None, (where, ".".join(keys), sentence))))


def _parse(text: str, place: Place, keys: Keys) -> _Node:
    """Read YAML text as the value of `keys`."""
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        raise _error(place(line), keys, f"not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _error(place(line), keys, f"not valid YAML: {error.reason}") from error
    if node is None:
        return _Node(None, "", place(1))
    return _convert(node, place(node.start_mark.line + 1), place, keys, ())


def _convert(node: yaml.Node, where: str, place: Place, keys: Keys, outer: tuple[yaml.Node, ...]) -> _Node:
    """A YAML node as ours. A value belongs to the line of its key, `where`; `outer` holds the nodes around it."""
    # BaseLoader gives these three tags to whatever was written without one, so any other was written.
    if node.tag.removeprefix("tag:yaml.org,2002:") not in ("str", "seq", "map"):
        raise _error(where, keys, f"tag '{node.tag}' is not allowed; a recipe holds plain values only")
    if node in outer:
        raise _error(where, keys, "an alias stands inside the value it names; write the value out")
    outer = (*outer, node)
    if isinstance(node, yaml.ScalarNode):  # one in quotes has a style
        return _Node(node.value, None, where) if node.style else _Node(_scalar(node.value), node.value, where)
    if isinstance(node, yaml.SequenceNode):
        return _Node([_convert(item, where, place, keys, outer) for item in node.value], None, where)
    children: dict[str, _Node] = {}
    for key, value in node.value:
        line = place(key.start_mark.line + 1)
        if not isinstance(key, yaml.ScalarNode):
            raise _error(line, keys, "a key must be a word, not a list or a mapping")
        if key.value in children:
            raise _error(line, keys, f"key '{key.value}' is given twice; first at {children[key.value].where}")
        children[key.value] = _convert(value, line, place, (*keys, key.value), outer)
    return _Node(children, None, where)


def _scalar(text: str) -> Any:
    """A plain scalar by itself, close to YAML 1.2's core rules: `no`, `yes` and `on` are texts."""
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


# ---------------------------------------------------------------------------------------------- overrides


def _check_stage(root: _Node, name: str) -> None:
    stages = root.value.get("stages") if isinstance(root.value, dict) else None
    names = stages.value if stages is not None and isinstance(stages.value, dict) else {}
    if name not in names:
        raise _error(COMMAND_LINE, (), f"unknown stage '{name}'{hint(name, names)}")


def _overridden(root: _Node, override: str, stage: str | None) -> _Node:
    """`root` with one `a.b=value` of the command line put in."""
    name, equals, text = override.partition("=")
    if not equals:
        raise _error(COMMAND_LINE, (), f"'{override}' must have the form section.key=value")
    keys = tuple(name.strip().split("."))
    if keys[0] == "train":
        if stage is None:
            raise _error(COMMAND_LINE, keys, "'train.' stands for the chosen stage, and none is; write stages.<name>.")
        keys = ("stages", stage, *keys[1:])
    if keys[0] == "stages" and len(keys) > 1:
        _check_stage(root, keys[1])
    return _grafted(root, keys, _parse(text, lambda line: COMMAND_LINE, keys))


def _grafted(node: _Node, keys: Keys, new: _Node) -> _Node:
    """A copy of `node` with `new` at `keys`. What an alias shares with other places stays as it was there."""
    if not keys:
        return new
    if not isinstance(node.value, dict):
        node = _Node({}, None, COMMAND_LINE)
    inner = node.value.get(keys[0], _Node({}, None, COMMAND_LINE))
    return node._replace(value={**node.value, keys[0]: _grafted(inner, keys[1:], new)})


def _where(root: _Node, keys: Keys) -> str:
    """Where the value at `keys` was written, or the nearest section around it when its default holds."""
    for key in keys:
        if not isinstance(root.value, dict) or key not in root.value:
            break
        root = root.value[key]
    return root.where


# ---------------------------------------------------------------------------------------------- a trained teacher


def _with_runs(root: _Node) -> tuple[_Node, dict[Keys, dict]]:
    """`root` with every teacher's `run` as the keys that it stands for, and by the keys of each the task that its model
    was trained for. Raises TrainingError when weights or result of that stage are damaged."""
    further = root.value.get("teachers") if isinstance(root.value, dict) else None
    names = further.value if further is not None and isinstance(further.value, dict) else ()
    tasks: dict[Keys, dict] = {}
    for keys in (("teacher",), *(("teachers", name) for name in names)):
        section = root
        for key in keys:
            section = section.value.get(key) if section is not None and isinstance(section.value, dict) else None
        given = section.value.get("run") if section is not None and isinstance(section.value, dict) else None
        folder = None if given is None else _build(given, str | None, (*keys, "run"))
        if folder is not None:
            made, tasks[*keys, "run"] = _with_run(section, given, folder, keys)
            root = _grafted(root, keys, made)
    return root, tasks


def _with_run(section: _Node, given: _Node, folder: str, keys: Keys) -> tuple[_Node, dict]:
    """A teacher's section at `keys` with what its `run`, this folder, stands for; the task that it was trained for."""
    names, run = [field.name for field in dataclasses.fields(Network)], (*keys, "run")
    for name in names:
        if name in section.value:
            both = ".".join((*keys, name))
            raise _error(given.where, run, f"says what {both} is, which is given too; leave one of them out")
    result, best = Path(folder) / RESULT, Path(folder) / BEST
    if not result.is_file():
        within = next(iter(sorted(Path(folder).glob(f"*/{RESULT}"))), Path("runs/<recipe>/<stage>/seed-0") / RESULT)
        raise _error(
            given.where,
            run,
            f"{folder} has no finished result ({RESULT}); train that stage to its end, or give the folder of one that "
            f"is, such as {within.parent}",
        )
    record = read_record(result, "identity")
    try:
        identity = record["identity"]
        trained, task = identity[identity["stage"]["model"]], identity["task"]
        found = {name: trained[name] for name in names if name in trained}
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{result}: does not say what was trained ({error}); train the stage again") from error
    best_digest(best, record.get("best_sha256"))
    brought = {name: _as_node(value, given.where) for name, value in {**found, "weights": str(best)}.items()}
    return section._replace(value={**section.value, "run": _Node(None, None, given.where), **brought}), task


def _run_problems(recipe: Recipe, trained_for: dict[Keys, dict]) -> Problems:
    """A teacher that was trained for another task than the recipe's."""
    for keys, task in trained_for.items():
        difference = first_difference(to_dict(recipe.task), task)
        if difference is not None:
            name, ours, its = difference
            yield keys, f"was trained for task.{name} = {its!r}, the recipe says {ours!r}; give a run of the same task"


def _as_node(value: Any, where: str) -> _Node:
    """A plain value as if it had been written at `where`."""
    if isinstance(value, dict):
        return _Node({key: _as_node(child, where) for key, child in value.items()}, None, where)
    return _Node([_as_node(one, where) for one in value] if isinstance(value, list) else value, None, where)


# ---------------------------------------------------------------------------------------------- nodes to dataclasses


def _build(node: _Node, wanted: Any, keys: Keys) -> Any:
    """The value of `node` as the type `wanted`: a dataclass (or null), a dict, Any, or what choose.fits knows."""
    union = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    section = next(filter(dataclasses.is_dataclass, typing.get_args(wanted) if union else (wanted,)), None)
    if section is not None:
        null = union and node.value is None and node.text != ""  # an empty section has its defaults
        return None if null else _section(node, section, keys)
    if typing.get_origin(wanted) is dict:
        inner = typing.get_args(wanted)[1]
        return {key: _build(child, inner, (*keys, key)) for key, child in _children(node, keys).items()}
    value = _plain(node)
    if wanted is Any:
        return value
    bare = _bare(wanted)
    if not fits(value, bare) and None not in (value, node.text) and fits(node.text, bare):
        value = node.text  # a text that looks like something else, such as `name: 2026`
    if not fits(value, bare):
        raise _error(node.where, keys, f"must be {describe(bare)}, not {_shown(node)}")
    try:
        return _settled(value, wanted)
    except ValueError as error:
        raise _error(node.where, keys, str(error)) from error


def _section(node: _Node, cls: type, keys: Keys) -> Any:
    """A mapping as the dataclass `cls`; unknown and missing keys are refused."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls, include_extras=True)
    children = _children(node, keys)
    for key, child in children.items():
        if key not in fields:
            raise _error(child.where, keys, f"unknown key '{key}'{hint(key, fields)}")
    missing = [
        f"'{name}'"
        for name, field in fields.items()
        if field.default is dataclasses.MISSING is field.default_factory and name not in children
    ]
    if missing:
        some = f"key {missing[0]} is" if len(missing) == 1 else f"keys {', '.join(missing)} are"
        raise _error(node.where, keys, f"required {some} missing")
    return cls(**{key: _build(child, hints[key], (*keys, key)) for key, child in children.items()})


def _children(node: _Node, keys: Keys) -> dict[str, _Node]:
    if node.text == "":  # a section whose keys are all left out or commented out
        return {}
    if not isinstance(node.value, dict):
        raise _error(node.where, keys, f"must be a mapping of keys to values, not {_shown(node)}")
    return node.value


def _plain(node: _Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    return [_plain(item) for item in node.value] if isinstance(node.value, list) else node.value


def _shown(node: _Node) -> str:
    """A value as an error quotes it: a scalar as it was written."""
    return "empty" if node.text == "" else repr(_plain(node) if node.text is None else node.text)


def _bare(wanted: Any) -> Any:
    """A type without its bounds."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Annotated:
        return _bare(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, map(_bare, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return tuple[_bare(arguments[0]), ...]
    return tuple[tuple(map(_bare, arguments))] if origin is tuple else wanted


def _settled(value: Any, wanted: Any) -> Any:
    """A value that fits, lists as tuples and whole numbers as floats where asked. ValueError: out of bounds."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Annotated:
        inner, bound = arguments
        if not bound.holds(value):
            raise ValueError(f"must be {describe(_bare(inner))}, {bound.words}, not {value!r}")
        return _settled(value, inner)
    if origin in (typing.Union, types.UnionType):
        return _settled(value, next(one for one in arguments if fits(value, _bare(one))))
    if origin is tuple:
        each = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(map(_settled, value, each))
    return float(value) if wanted is float else value
