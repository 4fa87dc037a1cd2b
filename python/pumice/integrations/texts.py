"""Text to calibrate on and text to evaluate on, never the same.

>>> load_text("pydoc")                             # from the standard library, no download
>>> load_text("wikipedia", split="calibration")    # fetched once, kept in the cache
>>> load_text("notes.txt")                         # a file of yours, as it is
"""

from __future__ import annotations

import bz2
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pumice.integrations._packages import MissingExtraError, PackagedFile, cached, extract
from pumice.integrations._wiki_markup import strip_markup

Split = Literal["evaluation", "calibration"]

TEXTS = {
    "wikipedia": "96 articles of the English Wikipedia of 2016, CC BY-SA 3.0, fetched once",
    "pydoc": "the topics of Python's own help(), PSF licence, no download",
    "wikitext2": "WikiText-2 (raw), CC BY-SA 3.0, through the package datasets",
}

# A real dump's beginning, shortened, which gensim ships for its tests. The options name one wheel
# of the release, so that every machine can check the same digest.
_WIKIPEDIA = PackagedFile(
    requirement="gensim==4.4.0",
    wheel_sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    member=(
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    ),
    licence="CC BY-SA 3.0",
    pip_options=(
        "--python-version=3.11",
        "--implementation=cp",
        "--abi=cp311",
        "--platform=manylinux_2_28_x86_64",
    ),
)
_EXPORT = "{http://www.mediawiki.org/xml/export-0.10/}"
_SHORTEST_ARTICLE = 2000  # characters of prose; below are redirects, stubs and disambiguations
_EVALUATION_EVERY = 4  # every fourth document is for evaluation, the others for calibration


def load_text(
    name_or_file: str | Path,
    *,
    split: Split = "evaluation",
    progress: Callable[[str], None] | None = None,
) -> str:
    """One string of text, documents separated by blank lines.

    Args:
        name_or_file: a name in ``TEXTS``, or a UTF-8 text file.
        split: "evaluation" or "calibration". The named texts are split by document, so the two
            never share one. A file is returned whole for either: keeping two files apart is yours.
        progress: called with a line of text before anything slow.

    Raises:
        ValueError: the name is neither known nor a file, the split is unknown, the file is empty
            or not UTF-8.
        MissingExtraError: ``wikitext2`` without the package ``datasets``.
        RuntimeError: ``wikipedia`` could not be fetched.
    """
    if split not in ("evaluation", "calibration"):
        raise ValueError(f"split must be 'evaluation' or 'calibration', got {split!r}")
    if name_or_file == "wikipedia":
        return "\n\n".join(_choose(_wikipedia_articles(progress), split))
    if name_or_file == "pydoc":
        return "\n\n".join(_choose(_pydoc_topics(), split))
    if name_or_file == "wikitext2":
        return _wikitext2(split)
    return _file(Path(name_or_file))


def _choose(documents: Sequence[str], split: Split) -> list[str]:
    evaluation = split == "evaluation"
    return [d for i, d in enumerate(documents) if (i % _EVALUATION_EVERY == 0) == evaluation]


def _wikipedia_articles(progress: Callable[[str], None] | None) -> list[str]:
    def fetch(folder: Path) -> None:
        extract(_WIKIPEDIA, folder, progress=progress)

    archive = cached("wikipedia-excerpt-1", fetch) / Path(_WIKIPEDIA.member).name
    articles = []
    for page in ElementTree.fromstring(bz2.decompress(archive.read_bytes())).iter(f"{_EXPORT}page"):
        wikitext = page.findtext(f"{_EXPORT}revision/{_EXPORT}text") or ""
        if page.find(f"{_EXPORT}redirect") is None and len(wikitext) >= _SHORTEST_ARTICLE:
            prose = strip_markup(wikitext)
            if len(prose) >= _SHORTEST_ARTICLE:
                articles.append(f"{page.findtext(f'{_EXPORT}title')}\n{prose}")
    return articles


def _pydoc_topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise MissingExtraError(
            "the text 'pydoc' is the standard library's pydoc_data.topics, which this build of "
            "Python leaves out; name a text file instead"
        ) from error
    return [text.strip() for _, text in sorted(topics.items())]


def _wikitext2(split: Split) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(
            "the text 'wikitext2' is loaded by the package datasets: pip install datasets"
        ) from error
    part = "test" if split == "evaluation" else "train"
    rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)
    return "".join(rows["text"])


def _file(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"text {str(path)!r} is neither a file nor one of: {', '.join(TEXTS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {path} is not UTF-8 ({error.reason})") from error
    if not text.strip():
        raise ValueError(f"text file {path} is empty")
    return text
