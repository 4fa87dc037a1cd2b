"""Plain prose from MediaWiki markup: enough for a language model's perplexity, no more.

Templates, tables, references, files and formulas are dropped with all they hold; links and
emphasis keep their words. Text that a template would have generated ("{{convert|5|km}}") is
therefore missing, which every model evaluated on the result sees alike.
"""

from __future__ import annotations

import html
import re

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_DROPPED_TAGS = "ref|math|gallery|timeline|source|syntaxhighlight|code|pre|score|imagemap|table"
_EMPTY_TAG = re.compile(rf"<({_DROPPED_TAGS})\b[^<>]*/>", re.IGNORECASE)
_DROPPED_TAG = re.compile(rf"<({_DROPPED_TAGS})\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
# Innermost first: a match holds no opening of its own kind, so repeating peels nested ones.
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[((?:[^\[\]]|\[[^\[\]]+\])*)\]\]")
_EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\[\]]*\s*([^\[\]]*)\]")
_EMPHASIS = re.compile(r"'{2,5}")
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_HEADING = re.compile(r"^(={2,6})\s*(.*?)\s*\1\s*$", re.MULTILINE)
_LIST_MARK = re.compile(r"^[*#:;]+\s*", re.MULTILINE)
_EMPTY_BRACKETS = re.compile(r"\s*\([\s,;:–-]*\)")
_APPARATUS = {
    "bibliography",
    "citations",
    "external links",
    "footnotes",
    "further reading",
    "gallery",
    "notes",
    "notes and references",
    "references",
    "see also",
    "sources",
}


def strip_markup(wikitext: str) -> str:
    """The prose of one article: paragraphs and headings, one a line, blank lines removed."""
    text = _DROPPED_TAG.sub("", _EMPTY_TAG.sub("", _COMMENT.sub("", wikitext)))
    text = _peel(_TABLE, _peel(_TEMPLATE, text))
    text = _drop_apparatus(text)
    while _LINK.search(text):
        text = _LINK.sub(_link_words, text)
    text = _EXTERNAL_LINK.sub(r"\1", text)
    text = _MAGIC_WORD.sub("", _EMPHASIS.sub("", _TAG.sub("", text)))
    text = _LIST_MARK.sub("", _HEADING.sub(r"\2", text))
    text = html.unescape(text).replace("\N{NO-BREAK SPACE}", " ")
    text = _EMPTY_BRACKETS.sub("", text)
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _peel(pattern: re.Pattern[str], text: str) -> str:
    count = 1
    while count:
        text, count = pattern.subn("", text)
    return text


def _link_words(match: re.Match[str]) -> str:
    target, _, label = match[1].partition("|")
    namespace, colon, _ = target.partition(":")
    # "File:", "Category:" and the two- or three-letter codes of other languages show no words here.
    if colon and (namespace.lower() in {"file", "image", "category"} or namespace.islower()):
        return ""
    return label.rpartition("|")[2] or target


def _drop_apparatus(text: str) -> str:
    """Remove the sections that are lists of links and books rather than prose."""
    kept, start, dropping_level = [], 0, 0
    for heading in _HEADING.finditer(text):
        if not dropping_level:
            kept.append(text[start : heading.start()])
        start = heading.start()
        level = len(heading[1])
        if dropping_level and level > dropping_level:
            continue  # a subsection of a dropped section
        dropping_level = level if heading[2].lower() in _APPARATUS else 0
    if not dropping_level:
        kept.append(text[start:])
    return "".join(kept)
