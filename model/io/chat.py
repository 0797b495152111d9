"""Chat templates, as `transformers` renders them."""

from __future__ import annotations

import json
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """{% generation %} marks the assistant's text; here it is a plain block."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body, lineno=line)


def refuse(message: str) -> None:
    raise TemplateError(message)


def to_json(value: object, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter escapes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template: str, messages: list[dict], tokens: dict[str, str]) -> str:
    """The messages, up to the beginning of the answer. tokens: bos_token, eos_token and others that templates name.

    Raises:
        ValueError: if the template is invalid or rejects these messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= dict(
        raise_exception=refuse, strftime_now=lambda form: datetime.now().astimezone().strftime(form)
    )
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens)
    except TemplateError as error:
        raise ValueError(f"the chat template does not take this: {error}") from None
