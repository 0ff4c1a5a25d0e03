"""YAML whose mappings know their lines, so that an error can name the one to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from flatwater.errors import ConfigError

__all__ = ["LinedDict", "parse_yaml", "place_of", "read_yaml"]


class LinedDict(dict[Any, Any]):
    """A mapping from a YAML text.

    Attributes:
        source: the file's name.
        line: where the mapping begins, from 1.
        lines: where each of its keys stands.
    """

    source: str
    line: int
    lines: dict[Any, int]

    def place(self, key: object = None) -> str:
        """``"norms.yaml, line 7"``: where the key stands, or else the mapping begins."""
        return f"{self.source}, line {self.lines.get(key, self.line)}"

    def override(self, key: str, value: Any) -> None:
        """Set a value that is not the file's."""
        self[key] = value
        self.lines.pop(key, None)


def read_yaml(path: Path) -> Any:
    """What a YAML file says; every mapping in it is a :class:`LinedDict`.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path of the configuration") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text; a configuration is a YAML file") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The same, of a text; ``source`` is what errors call it.

    Raises:
        ConfigError: it is no YAML, or gives a key twice.
    """
    try:
        loader = _Loader(text, source)
        try:
            return loader.get_document()
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = source if mark is None else f"{source}, line {mark.line + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{where}: is not YAML ({problem}); correct that line") from error


def place_of(document: Any, location: Sequence[int | str]) -> str | None:
    """Where a value within a document stands: that of its key, or of the nearest mapping around it that has a line.

    None for what came from elsewhere: it is in a mapping that knows no line of it.
    """
    place = None
    for step in location:
        if isinstance(document, LinedDict):
            if step in document and step not in document.lines:
                return None
            place = document.place(step)
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return place
    return document.place() if isinstance(document, LinedDict) else place


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self._source = source
        self._lines: dict[int, dict[Any, int]] = {}  # by the id of the node

    def get_document(self) -> Any:
        root = self.get_single_node()
        if root is None:
            return None
        self._note_lines(root)
        return self.construct_document(root)

    def _note_lines(self, node: yaml.Node) -> None:
        """Of every mapping, before construction resolves its ``<<``, whose keys may be given again."""
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._note_lines(item)
        if not isinstance(node, yaml.MappingNode) or id(node) in self._lines:
            return
        lines = self._lines[id(node)] = {}
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node)
                if key in lines:
                    raise ConfigError(
                        f"{self._source}, line {line}: {key!r} is given in line {lines[key]} already; keep one of them"
                    )
                lines[key] = line
            self._note_lines(value)

    def construct_lined(self, node: yaml.MappingNode) -> Iterator[LinedDict]:
        data = LinedDict()
        data.source, data.line, data.lines = self._source, node.start_mark.line + 1, self._lines[id(node)]
        yield data  # before its values, which may refer to it
        data.update(self.construct_mapping(node))
        data.lines = {**dict.fromkeys(data, data.line), **data.lines}  # merged keys are where the mapping is


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_lined)
