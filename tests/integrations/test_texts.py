"""Texts: markup, splits, refusals. Nothing here touches the network."""

import bz2
import sys

import pytest

from pumice.integrations import texts
from pumice.integrations._packages import MissingExtraError
from pumice.integrations._wiki_markup import strip_markup
from pumice.integrations.texts import load_text

PAGE = "<page><title>{title}</title>{redirect}<revision><text>{text}</text></revision></page>"


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("'''Bold''' and ''italic''.", "Bold and italic."),
        ("A [[link]] and [[target page|its words]].", "A link and its words."),
        ("Kept.{{cite|{{nested}}|x}} Kept too.", "Kept. Kept too."),
        ("One<ref name=a>gone [[x]]</ref>, two<ref name=a/>.", "One, two."),
        ("[[File:a.jpg|thumb|with [[a link]] and [sic] in it]]Text.", "Text."),
        ("See [http://example.org the site] or [http://example.org].", "See the site or ."),
        ("{| class=x\n| a {| b |} \n|}\nAfter.", "After."),
        ("== History ==\nOld.\n=== Early ===\nOlder.", "History\nOld.\nEarly\nOlder."),
        ("Text.\n== See also ==\n* [[x]]\n=== y ===\nz\n== Life ==\nMore.", "Text.\nLife\nMore."),
        ("Name ({{IPA|x}}) is <small>small</small> &amp; new.<!-- no -->", "Name is small & new."),
        (
            "[[fr:Nom]][[Category:Things]]Text [[Star Trek: The Movie]].",
            "Text Star Trek: The Movie.",
        ),
        ("x < y and y > z", "x < y and y > z"),
        ("unclosed {{template and [[link", "unclosed {{template and [[link"),
    ],
)
def test_markup_is_stripped(wikitext, prose):
    assert strip_markup(wikitext) == prose


def test_pydoc_is_split_by_document():
    from pydoc_data.topics import topics

    evaluation, calibration = load_text("pydoc"), load_text("pydoc", split="calibration")
    assert len(evaluation) > 50_000
    assert len(calibration) > 2 * len(evaluation)
    for topic in topics.values():
        assert (topic.strip() in evaluation) != (topic.strip() in calibration)


@pytest.fixture
def excerpt(tmp_path, monkeypatch):
    """A cache that already holds a small dump in the excerpt's place."""
    pages = [
        PAGE.format(title=f"Article {i}", redirect="", text=f"Fact {i}. " * 300) for i in range(8)
    ]
    pages.insert(3, PAGE.format(title="Moved", redirect="<redirect/>", text="Fact x. " * 400))
    pages.insert(5, PAGE.format(title="Stub", redirect="", text="Short."))
    dump = f'<mediawiki xmlns="{texts._EXPORT[1:-1]}">{"".join(pages)}</mediawiki>'
    folder = tmp_path / "wikipedia-excerpt-1"
    folder.mkdir()
    name = texts._WIKIPEDIA.member.rpartition("/")[2]
    (folder / name).write_bytes(bz2.compress(dump.encode()))
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path))


@pytest.mark.usefixtures("excerpt")
def test_wikipedia_articles_are_split_and_stubs_left_out():
    evaluation, calibration = load_text("wikipedia"), load_text("wikipedia", split="calibration")
    assert [i for i in range(8) if f"Article {i}\n" in evaluation] == [0, 4]
    assert [i for i in range(8) if f"Article {i}\n" in calibration] == [1, 2, 3, 5, 6, 7]
    assert "Moved" not in evaluation + calibration
    assert "Stub" not in evaluation + calibration


def test_a_file_is_taken_as_it_is(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("naïve\n\ntext\n", encoding="utf-8")
    assert load_text(file) == load_text(str(file), split="calibration") == "naïve\n\ntext\n"


def test_refusals_name_the_culprit(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'wikipeda' is neither a file nor one of: wikipedia"):
        load_text("wikipeda")
    with pytest.raises(ValueError, match=r"split must be .* got 'test'"):
        load_text("pydoc", split="test")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        load_text(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        load_text(tmp_path / "latin.txt")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="pip install datasets"):
        load_text("wikitext2")
