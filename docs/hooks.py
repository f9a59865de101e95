"""What the site's pages are made of beside Markdown: formulas, and the help of every command."""

import argparse
import os
import re
from typing import Any

from latex2mathml.converter import convert

from diffusionad_hf.cli.main import _parser
from diffusionad_hf.training.arguments import _parser as training_parser


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Formulas become MathML, which browsers draw themselves; `<!-- commands -->` becomes the help of all commands."""
    markdown = re.sub(r"^```math\n(.*?)^```$", lambda found: _formula(found[1]), markdown, flags=re.M | re.S)
    return markdown.replace("<!-- commands -->", _commands()) if "<!-- commands -->" in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name other objects as [`name`] and types as `type`, *optional*: without the marks."""
    html = re.sub(r"\[(<code>[^<]*</code>)\](?![(\[])", r"\1", html)
    return re.sub(r"<code>[^<`]*`[^<]*</code>", lambda found: re.sub(r"\[`|`\]|[`*]", "", found[0]), html)


def _formula(latex: str) -> str:
    return convert(latex.strip(), display="block").replace("\n", " ") + "\n"


def _commands() -> str:
    os.environ["COLUMNS"] = "100"  # of the help
    parser = _parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parsers = {name: command for name, command in commands.choices.items() if name != "train"}
    parsers["train"] = training_parser("diffusionad train")
    sections = [f"```text\n{parser.format_help()}```"]
    sections += [f"## {name}\n\n```text\n{parsers[name].format_help()}```" for name in commands.choices]
    return "\n\n".join(sections)
