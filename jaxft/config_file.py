"""Config files: Python with `get_config()`, or YAML and JSON, whose errors name file and line."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from jaxft.config import Item, RunConfig, from_dict, unknown_key, walk
from jaxft.errors import ConfigError, nearest, searched

SUFFIXES = (".py", ".yaml", ".yml", ".json")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_WHOLE = re.compile(r"[-+]?\d+(?:_\d+)*")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_AMBIGUOUS = re.compile(r"[-+]?0\d+")
_NULL = ("", "~", "null", "Null", "NULL")


def read_file(file: str) -> RunConfig:
    """Returns the config of a file: `.py`, `.yaml`, `.yml` or `.json`.

    In YAML and JSON, groups nest or keys have dots, as in `optim.learning_rate`. A workdir's
    `config.json` is such a file.

    Raises:
      ConfigError: For a file that cannot be used; for YAML and JSON with all that is wrong in it.
    """
    path = Path(file)
    if not path.is_file():
        known = [str(p) for suffix in SUFFIXES for p in Path("configs").glob(f"*{suffix}")]
        raise ConfigError(
            f"There is no config file {file!r}.{nearest(file, known)}{searched(file)}"
        )
    match path.suffix.lower():
        case ".py":
            return _read_python(file, path)
        case ".yaml" | ".yml" | ".json":
            return _Reader(file).read(path)
    raise ConfigError(
        f"{file}: a config file ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}."
    )


def _read_python(file: str, path: Path) -> RunConfig:
    spec = importlib.util.spec_from_file_location("jaxft_run_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise ConfigError(
            f"{file}: {type(error).__name__}: {error}. A config file defines get_config(), which "
            "returns a jaxft.RunConfig."
        ) from error
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"{file}: get_config() returned a {type(config).__name__}; expected a jaxft.RunConfig."
        )
    return config


class _Wrong(Exception):
    """A problem at one place of the file, without the place."""

    def __init__(self, problem: str, node: yaml.Node):
        super().__init__(problem)
        self.node = node


class _Reader:
    """Reads one YAML or JSON file and collects what is wrong with it.

    Values are read by the type of their key and not by YAML's own rules: `1e-5` is a number,
    `off` is a text for a key that holds texts, and `010` is neither 8 nor 10 but an error.
    """

    def __init__(self, file: str):
        self.file = file
        self.config = RunConfig()
        self.items: dict[str, Item] = {}
        self.groups: set[str] = set()
        self.problems: list[str] = []
        self.lines: dict[str, int] = {}
        self.values: dict[str, Any] = {}

    def read(self, path: Path) -> RunConfig:
        """Returns the config, or raises with every problem found."""
        root = self._compose(path)
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(
                f"{self.file}: expected keys and values, such as 'train: {{steps: 100}}', or "
                "'train.steps: 100'."
            )
        self._list_keys(root)
        self._read_group(root, "")
        if self.problems:
            raise ConfigError(self.problems)
        return from_dict(self.values)

    def _list_keys(self, root: yaml.MappingNode) -> None:
        """Lists the keys that there are, which depend on the objective."""
        if name := _find(root, "objective", "name"):
            self.config.objective.name = name
        try:
            self.items = {item.path: item for item in walk(self.config)}
        except ConfigError as error:  # of an unknown objective
            said = [f"{self.file}: objective.name: {text}" for text in error.problems]
            raise ConfigError(said) from error
        paths = [path.split(".") for path in self.items]
        self.groups = {".".join(p[:end]) for p in paths for end in range(1, len(p))}

    def _compose(self, path: Path) -> yaml.Node | None:
        try:
            text = path.read_text("utf-8-sig")
            if path.suffix.lower() == ".json":
                json.loads(text, parse_constant=_refuse_constant)
                text = text.replace("\t", " ")  # only between tokens: in texts JSON has \t
            return yaml.compose(text, Loader=yaml.SafeLoader)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{self.file}:{error.lineno}: broken JSON: {error.msg}.") from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark else ""
            said = " ".join(filter(None, (error.context, error.problem)))
            raise ConfigError(f"{self.file}{line}: broken YAML: {said}.") from error
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"{self.file} cannot be read: {error}") from error

    def _read_group(self, node: yaml.MappingNode, prefix: str) -> None:
        for key, value in node.value:
            try:
                self._read_key(key, value, prefix)
            except _Wrong as wrong:
                line = wrong.node.start_mark.line + 1
                self.problems.append(f"{self.file}:{line}: {wrong}")

    def _read_key(self, key: yaml.Node, value: yaml.Node, prefix: str) -> None:
        if not isinstance(key, yaml.ScalarNode):
            raise _Wrong("a key is a word, such as steps.", key)
        if key.tag == "tag:yaml.org,2002:merge":
            raise _Wrong("'<<' is not read; write the keys out.", key)
        path = prefix + _text(key)
        if path in self.lines:
            first = self.lines[path]
            raise _Wrong(f"{path} is set twice, in line {first} already. Keep one.", key)
        if path in self.groups and isinstance(value, yaml.MappingNode):
            self._read_group(value, f"{path}.")
        elif path in self.groups:
            raise _Wrong(f"{path} is a group of keys; expected '{path}: {{key: value}}'.", value)
        elif path not in self.items:
            if path.startswith("objective.") and isinstance(value, yaml.MappingNode):
                # The group of another objective: each of its keys is told whose it is.
                return self._read_group(value, f"{path}.")
            raise _Wrong(unknown_key(path, self.config), key)
        else:
            self.lines[path] = key.start_mark.line + 1
            self._read_value(self.items[path], value)

    def _read_value(self, item: Item, node: yaml.Node) -> None:
        if isinstance(node, yaml.ScalarNode):
            value = _scalar(item, node)
        elif write := _ONE_LINE.get(item.path):
            value = write(item.path, node)
        else:
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a group"
            raise _Wrong(f"{item.path} is {kind}; expected {item.expected}.", node)
        for problem in replace(item, value=value).problems():
            raise _Wrong(problem, node)
        self.values[item.path] = value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON.")


def _text(node: yaml.ScalarNode) -> str:
    """Returns a scalar as it is written, halves of characters from JSON's escapes joined."""
    text = node.value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.rstrip("\n") if node.style in ("|", ">") else text


def _scalar(item: Item, node: yaml.ScalarNode) -> Any:
    """Returns a value of the key's type, whatever YAML would take the text for."""
    text, quoted = _text(node), node.style is not None
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise _Wrong(f"{item.path} has the tag {node.tag!r}; expected {item.expected}.", node)
    shown = repr(text) if quoted else text
    expected = f"{item.path} is {shown}; expected {item.expected}."
    if not quoted and text in _NULL:
        empty = " Write '' for none." if item.type is str else " Leave the key out for its default."
        raise _Wrong(f"{item.path} is empty; expected {item.expected}.{empty}", node)
    if item.type is str:
        if not quoted and text.lower() in ("true", "false"):
            raise _Wrong(f"{expected} Put it in quotes if it is one.", node)
        return text
    if quoted:
        raise _Wrong(f"{expected} Leave the quotes out.", node)
    if item.type is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise _Wrong(expected, node)
        return text.lower() in _TRUE
    if _AMBIGUOUS.fullmatch(text):
        raise _Wrong(f"{expected} {text} is another number in YAML 1.1 than in 1.2.", node)
    if item.type is int and _WHOLE.fullmatch(text):
        return int(text)
    if item.type is float and _NUMBER.fullmatch(text):
        return float(text)
    raise _Wrong(expected, node)


def _part(path: str, node: yaml.Node, forbidden: str) -> str:
    """Returns one part of a one-line form, which has no way to quote what separates parts."""
    if not isinstance(node, yaml.ScalarNode):
        raise _Wrong(f"{path} has a list or a group in a place for a text.", node)
    text = _text(node).strip()
    if not text or (node.style is None and text in _NULL):
        raise _Wrong(f"{path} has an empty part.", node)
    bare = re.sub(r"\[[^\]]*\]", "", text)  # a hub split in brackets may hold anything
    found = next((character for character in forbidden if character in bare), None)
    if found:
        raise _Wrong(f"{path} has {text!r}; {found!r} separates parts and cannot be in one.", node)
    return text


def _pairs(path: str, node: yaml.Node, forbidden: str) -> Iterator[tuple[str, str]]:
    """Yields the keys and values of a mapping without duplicates."""
    if not isinstance(node, yaml.MappingNode):
        raise _Wrong(f"{path} holds a list; expected texts or 'key: value'.", node)
    seen = set()
    for key, value in node.value:
        name = _part(path, key, f"{forbidden}=")
        if name in seen:
            raise _Wrong(f"{path} has {name!r} twice. Keep one.", key)
        seen.add(name)
        yield name, _part(path, value, forbidden)


def _sources(path: str, node: yaml.Node, forbidden: str = ",") -> str:
    """Writes a list of sources, each a text or a mapping with `path`, in one line."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not nodes:
        raise _Wrong(f"{path} is an empty list. Write '' for none.", node)
    return ",".join(_source(path, part, forbidden) for part in nodes)


def _source(path: str, node: yaml.Node, forbidden: str) -> str:
    if isinstance(node, yaml.ScalarNode):
        return _part(path, node, forbidden)
    options = []
    name = None
    for key, value in _source_pairs(path, node, forbidden):
        if key == "path":
            name = value
        else:
            options.append(f"{key}={value}")
    if name is None:
        raise _Wrong(f"{path} has a source without 'path'.", node)
    return ":".join([name, *options])


def _source_pairs(path: str, node: yaml.Node, forbidden: str) -> Iterator[tuple[str, str]]:
    """Returns `_pairs`; a mapping as `columns` becomes options of its own, as a line has them."""
    if not isinstance(node, yaml.MappingNode):
        raise _Wrong(f"{path} holds a list in a list; expected texts or mappings.", node)
    plain = [pair for pair in node.value if not isinstance(pair[1], yaml.MappingNode)]
    for name, value in _pairs(path, yaml.MappingNode(node.tag, plain), forbidden):
        if name != "path" and ":" in value:
            raise _Wrong(f"{path} has {value!r}; ':' separates options and cannot be in one.", node)
        yield name, value
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            if _part(path, key, "") != "columns":
                raise _Wrong(f"{path}: {key.value!r} is a group; expected a text.", value)
            yield from _pairs(path, value, f"{forbidden}:")


def _data_sets(path: str, node: yaml.Node) -> str:
    """Writes `{name: sources}` as 'name=source', several separated by ';'."""
    if not isinstance(node, yaml.MappingNode):
        raise _Wrong(f"{path} is a list; expected 'name: source'.", node)
    found: dict[str, str] = {}
    for key, value in node.value:
        name = _part(path, key, ";=")
        if name in found:
            raise _Wrong(f"{path} has {name!r} twice. Keep one.", key)
        is_text = isinstance(value, yaml.ScalarNode)
        found[name] = _part(path, value, ";") if is_text else _sources(path, value, ",;")
    return ";".join(f"{name}={sources}" for name, sources in found.items())


def _assignments(path: str, node: yaml.Node) -> str:
    """Writes a mapping as 'name=value', comma-separated."""
    return ",".join(f"{name}={value}" for name, value in _pairs(path, node, ","))


def _list(path: str, node: yaml.Node) -> str:
    """Writes a list of texts, comma-separated."""
    if not isinstance(node, yaml.SequenceNode):
        raise _Wrong(f"{path} is a group; expected a text or a list of texts.", node)
    return ",".join(_part(path, part, ",") for part in node.value)


# Keys whose texts have parts, which a file may write as lists and mappings.
_ONE_LINE: dict[str, Callable[[str, yaml.Node], str]] = {
    "data.train": _sources,
    "data.validation": _sources,
    "data.columns": _assignments,
    "eval.datasets": _data_sets,
    "eval.retention": _sources,
    "model.add_tokens": _list,
    "train.compiler_options": _assignments,
}


def _find(node: yaml.Node, *keys: str) -> str:
    """Returns the text under some keys, nested or joined by dots; empty if there is none."""
    if not keys:
        return node.value if isinstance(node, yaml.ScalarNode) else ""
    if not isinstance(node, yaml.MappingNode):
        return ""
    for end in range(1, len(keys) + 1):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == ".".join(keys[:end]):
                return _find(value, *keys[end:])
    return ""
