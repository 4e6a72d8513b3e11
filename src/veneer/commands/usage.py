"""What is said when a command line, or a YAML file that it names, is wrong."""

import re
from collections.abc import Mapping, Sequence

from jsonargparse import ArgumentParser

from veneer.errors import ConfigError, nearest


class UsageError(ConfigError):
    """The command line, or the YAML file it names, is not one that the command understands."""


def usage_error(
    message: str, command: str, arguments: Sequence[str], subparsers: Mapping[str, ArgumentParser]
) -> UsageError:
    """jsonargparse's message in our words, with the nearest name where one is unknown."""
    if command not in subparsers:
        given = "No command was given."
        if command:
            given = f"There is no command {command!r}.{nearest(command, subparsers)}"
        elif arguments:
            given = f"Unknown argument {arguments[0]}.{nearest(arguments[0], ['--help', '--version', '--debug'])}"
        return UsageError(f"{given} The commands are {', '.join(subparsers)}. Try: veneer --help")
    known = _known(subparsers[command])
    config = _config_file(arguments)
    if match := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        unknown = match[1].split()[0].partition("=")[0]
        text = f"Unknown argument {unknown}.{nearest(unknown, ['--' + name for name in known])}"
    elif match := re.search(r"does not accept option '([^']*)'", message):
        text = f"{config or command}: unknown setting {match[1]!r}.{nearest(match[1], known)}"
    elif match := re.search(r"arguments are required: (.*)", message):
        missing = [name.removeprefix(f"{command}.") for name in match[1].split(", ")]
        options = [f"--{name}" if name in known else name.upper() for name in missing]
        text = f"Not given, but needed: {', '.join(options)}."
    else:
        text = plain(message).replace('"<unicode string>"', config or "the value")
    return UsageError(f"{text} Try: veneer {command} --help")


def plain(message: str) -> str:
    r"""jsonargparse's message without the names of Python's types.

    >>> plain('Parser key "task":\n  Expected a typing.Literal[\'a\', \'b\']. Got value: c')
    "--task: expected one of 'a', 'b'; got c."
    >>> plain('Parser key "seed":\n  Expected a <class \'int\'>. Got value: 1.5')
    '--seed: expected int; got 1.5.'
    >>> plain(
    ...     'Parser key "limit":\n Does not validate against any of the Union subtypes\n Subtypes: [int, NoneType]\n'
    ...     ' Errors:\n - Expected a int\n - Expected a NoneType\n Given value type: str\n Given value: many'
    ... )
    '--limit: expected int or null; got many.'
    """
    message = " ".join(message.split())
    message = re.sub(
        r'Parser key "([^"]*)":', r"--\1:", message.replace('training: Parser key "', 'Parser key "training.')
    )
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(r"typing\.Literal\[([^]]*)\]", r"one of \1", message)
    message = re.sub(
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value: (.*)",
        lambda match: f"expected {match[1].replace('NoneType', 'null').replace(', ', ' or ')}; got {match[2]}",
        message,
    )
    message = re.sub(r"Expected an? (.*)\. Got value: (.*)", r"expected \1; got \2", message)
    return message if message.endswith((".", "?")) else f"{message}."


def _known(parser: ArgumentParser) -> list[str]:
    return [option.lstrip("-") for action in parser._actions for option in action.option_strings if option[:2] == "--"]


def _config_file(arguments: Sequence[str]) -> str:
    """The file after the last `--config`."""
    for i in range(len(arguments) - 1, -1, -1):
        name, equals, value = arguments[i].partition("=")
        if name == "--config":
            return value if equals else " ".join(arguments[i + 1 : i + 2])
    return ""
