"""YAML files and `key=value` overrides become one checked schema; whatever does not fit is one sentence."""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from matformer.config.schema import RunConfig, Section
from matformer.errors import ConfigError
from matformer.files import write_whole

Tree = dict[str, Any]

PARTS = {"model": "model", "data": "data", "plan": "parallel"}
"""Folder under configs/ and key of a run -> section of the schema that it fills."""


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of its version 1.2: `no` is a language, `1e-3` a number, a date is text."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice: the second would silently win."""
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            names = [key.value for key, _ in node.value]
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice} stands twice", node.start_mark)
        return mapping


_SCALARS = {
    "null": r"(?:~|null|)$",
    "bool": r"(?:true|false)$",
    "int": r"[-+]?(?:0|[1-9][0-9_]*)$",
    "float": r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$",
}
for _name, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), None)


def load_run(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `path` and its overrides describe, typed; `check.check` holds the rules between keys.

    `model`, `data` and `plan` of the run file are names of files in configs/{model,data,plan}/ beside its folder, or
    mappings; a mapping may start from a file (`model: {from: demo, atto: {layers: 4}}`). `plan` fills `parallel`.
    Over these lie the run file's other sections, then the overrides (`train.steps=6`, `model=demo`). A run file may
    itself start from another (`from: ../../run/text`, a path beside it without its ending): it lies over that one, but
    a part that it names, or whose mapping names a file, takes the place of the other's.
    null takes a key or an entry away that stood below. Raises ConfigError.
    """
    path = Path(path)
    pairs = [_split_override(text) for text in overrides]
    chain = _chain(path)
    chain[-1][1].update((key, value) for key, value in pairs if key in PARTS)
    tree: Tree = {}
    for _, run in chain:  # the first of the chain says where the parts are
        tree = _over(tree, run, path=chain[0][0])
    for key, value in pairs:
        if key not in PARTS:
            tree = _merged(tree, _nested(key, value))
    return _fitted(parse(tree))


def _fitted(config: RunConfig) -> RunConfig:
    """The same run, its microbatch no larger than what the global batch leaves for a rank."""
    share = config.train.global_batch // config.parallel.dp
    if not 0 < share < config.train.micro_batch:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": share})})


def read_yaml(path: Path) -> Tree:
    """The mapping in a YAML file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"a config must be a file, got {path}, which does not exist{_near_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"a config must be a readable UTF-8 file, got {path}: {error}") from None
    tree = _parse_yaml(text, where=str(path))
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{path} must hold `key: value` lines, got {_shown(tree)}")
    return tree


def parse(tree: Mapping[str, Any]) -> RunConfig:
    """A plain tree (strings, numbers, lists, mappings) as a RunConfig, strictly typed. Raises ConfigError."""
    for key, value in _leaves(tree):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key} must be a finite number, got {value}")
    try:
        # Through JSON, because only there strict types still take a list for a tuple and 1 for 1.0.
        return RunConfig.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise ConfigError(_sentence(error, tree=tree)) from None


def save_resolved(config: RunConfig, path: Path) -> None:
    """Write every key with its value; `load_run` reads it back equal. The file appears whole or not at all."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    write_whole(path, text.encode())


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys whose values differ, sorted."""
    before, after = (dict(_leaves(config.model_dump(mode="json"))) for config in (old, new))
    absent = object()
    return sorted(key for key in before | after if before.get(key, absent) != after.get(key, absent))


def value_of(config: RunConfig, key: str) -> Any:
    """The value of one dotted key, as plain data. Raises ConfigError."""
    value: Any = config.model_dump(mode="json")
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ConfigError(_unknown(key, tree=config.model_dump(mode="json")))
        value = value[name]
    return value


def _chain(path: Path) -> list[tuple[Path, Tree]]:
    """The run file at `path` and what it starts from, the first of them first."""
    chain: list[tuple[Path, Tree]] = []
    while True:
        run = read_yaml(path)
        chain.insert(0, (path, run))
        name = run.pop("from", None)
        if name is None:
            return chain
        if not isinstance(name, str):
            raise ConfigError(f"from in {path} must be the path of a run file without .yaml, got {_shown(name)}")
        path = path.parent / f"{name}.yaml"
        if any(path.resolve() == seen.resolve() for seen, _ in chain):
            raise ConfigError(f"a run must not start from itself, got from: {name} in {chain[0][0]}; change from")


def _over(base: Tree, run: Tree, *, path: Path) -> Tree:
    """The run's tree over `base`, its three parts read in, the run's own `parallel` over its plan."""
    tree = base
    for key, section in PARTS.items():
        value = run.get(key)
        if value is None:
            continue
        if not isinstance(value, dict) or "from" in value:
            tree = {name: below for name, below in tree.items() if name != section}
        tree = _merged(tree, {section: _part(value, key=key, path=path)})
    return _merged(tree, {key: value for key, value in run.items() if key not in PARTS})


def _part(value: Any, *, key: str, path: Path) -> Any:
    """What `model: demo`, `model: {...}` or `model: {from: demo, ...}` stands for."""
    if isinstance(value, dict) and "from" not in value:
        return value
    name = value["from"] if isinstance(value, dict) else value
    folder = path.absolute().parent.parent / key
    if not isinstance(name, str):
        raise ConfigError(f"{key} must be the name of a file in {folder}, or a mapping, got {_shown(name)}")
    file = folder / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"{key} must be the name of a file in {folder}, got {name}{_near_files(file)}")
    tree = read_yaml(file)
    return _merged(tree, {k: v for k, v in value.items() if k != "from"}) if isinstance(value, dict) else tree


def _merged(base: Tree, over: Tree) -> Tree:
    """`over` laid upon `base`, mapping by mapping; null takes the key away."""
    tree = copy.copy(base)
    for key, value in over.items():
        if value is None and key in tree:
            del tree[key]
        elif isinstance(value, dict) and isinstance(tree.get(key), dict):
            tree[key] = _merged(tree[key], value)
        else:
            tree[key] = _merged({}, value) if isinstance(value, dict) else value
    return tree


def _split_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key or any(not name for name in key.split(".")):
        raise ConfigError(f"an override must be key=value with a dotted key, such as train.steps=100, got {text}")
    return key, _parse_yaml(value, where=f"the value of {key}")


def _nested(key: str, value: Any) -> Tree:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _parse_yaml(text: str, *, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader underneath
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where} must be YAML, got this{place}: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where} must be YAML, got this: {str(error).splitlines()[0]}") from None


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of everything that is not a mapping; an empty mapping is a leaf."""
    if not isinstance(tree, Mapping) or not tree:
        return [(prefix, tree)] if prefix else []
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))]


def _sentence(error: ValidationError, *, tree: Mapping[str, Any]) -> str:
    """The first complaint in our words; unknown keys first, since they explain the missing ones."""
    complaints = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    one = complaints[0]
    key = ".".join(str(part) for part in one["loc"])
    if one["type"] == "extra_forbidden":
        return _unknown(key, tree=tree)
    if one["type"] == "missing":
        return f"{key} must be given, it has no default; set {key}"
    if one["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} must be a mapping of keys, got {_shown(one['input'])}; set keys below {key}"
    must = re.sub(r"^\w+ should ", "must ", one["msg"])
    got = "" if one["type"] in ("too_short", "too_long") else f", got {_shown(one['input'])}"
    return f"{key} {must}{got}; set {key}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _unknown(key: str, *, tree: Mapping[str, Any]) -> str:
    known = _known_keys(RunConfig, tree=tree)
    got = dict(_leaves(tree)).get(key)
    came = f" (got {_shown(got)})" if got is not None else ""
    near = _nearest(key, known=known)
    return f"every key must be one that the schema knows, got {key}{came}; " + (
        f"the nearest is {near}" if near else f"known there: {', '.join(_siblings(key, known=known))}"
    )


def _known_keys(section: type[Section], *, tree: Any, prefix: str = "") -> list[str]:
    """Every dotted key of the schema; entries of named mappings (media, sources) are those of the tree."""
    keys = []
    for name, field in section.model_fields.items():
        below = tree.get(name) if isinstance(tree, Mapping) else None
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += _known_keys(field.annotation, tree=below, prefix=f"{prefix}{name}.")
        elif get_origin(field.annotation) is dict and isinstance(below, Mapping):
            entry = get_args(field.annotation)[1]
            for one in below if isinstance(entry, type) and issubclass(entry, Section) else ():
                keys += _known_keys(entry, tree=below[one], prefix=f"{prefix}{name}.{one}.")
    return keys


def _nearest(key: str, *, known: list[str]) -> str | None:
    """A key of the same section that is spelled alike, else one of the same last name, else one spelled alike."""
    section, _, leaf = key.rpartition(".")
    beside = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == section}
    if near := difflib.get_close_matches(leaf, beside, n=1, cutoff=0.6):
        return beside[near[0]]
    namesakes = [one for one in known if one.rpartition(".")[2] == leaf]
    if near := difflib.get_close_matches(key, namesakes, n=1, cutoff=0.0):
        return near[0]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return near[0] if near else None


def _siblings(key: str, *, known: list[str]) -> list[str]:
    section = key.rpartition(".")[0]
    return [one for one in known if one.rpartition(".")[0] == section] or [one for one in known if "." not in one]


def _near_files(path: Path) -> str:
    names = sorted(file.stem for file in path.parent.glob("*.yaml"))
    if not names:
        return ""
    near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.6)
    return f"; the nearest there is {near[0]}" if near else f"; there are {', '.join(names)}"
