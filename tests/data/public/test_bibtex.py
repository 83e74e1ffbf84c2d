"""BibTeX as the ACL Anthology writes it, and what people write besides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.data.public.bibtex import BibEntry, plain_text, read_bibtex, split_names

ENTRIES = r"""% https://aclanthology.org/anthology+abstracts.bib.gz generated on 2026-01-01

@proceedings{demo-2023-proceedings,
    title = "Proceedings of the {D}emo",
    year = "2023",
}
@inproceedings{ann-etal-2023-how,
    title = "{H}ow to ``quote'' a {``}quote{''}: {LM}s {\&} more",
    author = "Ann, A.  and
      {\'E}mile, B{\"o}b  and
      {Ann and Bob Ltd.}",
    month = dec # "~" # 5,
    year = 2023,
    abstract = "An abstract with {"}inner{"} quotes, a = sign, and an @ at work.
@ in the first column is the only thing programs never write inside an entry",
}
@article{whole, title={Outer {inner {deep}}}, note = "", year=1999}
@string{acl = {Association}}
@misc{broken, title = {never closed
@misc{after, title = {Still read}}
@misc{nothing, title = , year = 2000}
@misc{trailing, year = 2000 oops}
@comment{anything at all}
"""


def test_entries_one_by_one_and_the_bad_ones_by_line() -> None:
    found = dict(read_bibtex(ENTRIES.replace("@ in the first", " @ in the first").splitlines(keepends=True)))
    good = {line: entry for line, entry in found.items() if isinstance(entry, BibEntry)}
    assert [(entry.kind, entry.key) for entry in good.values()] == [
        ("proceedings", "demo-2023-proceedings"),
        ("inproceedings", "ann-etal-2023-how"),
        ("article", "whole"),
        ("misc", "after"),
    ]
    paper = good[7].fields
    assert list(paper) == ["title", "author", "month", "year", "abstract"]
    assert (paper["month"], paper["year"]) == ("dec~5", "2023")
    assert plain_text(paper["title"]) == "How to “quote” a “quote”: LMs & more"
    assert plain_text(paper["abstract"]).startswith('An abstract with "inner" quotes, a = sign, and an @ at work. @ in')
    assert split_names(paper["author"]) == ["Ann, A.", "Émile, Böb", "Ann and Bob Ltd."]
    assert good[17].fields == {"title": "Outer {inner {deep}}", "note": "", "year": "1999"}
    bad = [entry for entry in found.values() if isinstance(entry, str)]
    assert bad == ["the entry's braces are not closed", "title: has no value", "not a field: 'oops}'"]


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"{\'E}tude of \textit{LM}s", "Étude of LMs"),
        (r"{\v{s}}{\v s}\v{S} {\c{c}} {\'\i} {\`\i}{\^\i} {\u\i}", "ššŠ ç í ìî ĭ"),
        (r"{\o}{\O}{\l}{\L}{\ss}{\ae}{\aa}{\DJ}inh", "øØłŁßæåĐinh"),
        (r"{\textcommabelow{s}} {\H{o}} {\.z} {\=a} {\~n} {\r{u}} {\k{a}}", "ș ő ż ā ñ ů ą"),
        (r"characters{'} and {`}single{'}", "characters’ and ‘single’"),
        ("a{--}b{---}c", "a–b—c"),
        (r"5{\%} {\&} {\#}1 {\$}5 a{\_}b \{x\}", "5% & #1 $5 a_b {x}"),
        (r"{\mbox{$\times$}}2, $\alpha \leq \beta^{2}$", "×2, α≤β^2"),
        (r"{\mbox{$^\circ$}} Norm {\ldots}", "^° Norm …"),
        (r"\href{https://example.org/{x}}{the site}, \url{x.org}", "the site, x.org"),
        (r"RED\textsuperscript{\textrm{FM}} \muPLAN{} \cite{x}", "REDFM muPLAN citex"),
        ("non{~}breaking~space\n   and lines", "non breaking space and lines"),
        (r"{\textasciitilde}x \textbackslash y", "~x \\y"),
        ("", ""),
    ],
)
def test_latex_as_plain_text(latex: str, text: str) -> None:
    assert plain_text(latex) == text


WORDS = st.text(
    st.characters(blacklist_characters="{}\\\"$~`'-#@\r\n", blacklist_categories=("Cs", "Co", "Cc")), max_size=40
)


@given(title=WORDS, names=st.lists(WORDS.filter(lambda name: name.strip()), min_size=1, max_size=3))
def test_ordinary_text_survives_in_braces_and_quotes(title: str, names: list[str]) -> None:
    names = [" ".join(name.split()).replace(" and ", " und ") for name in names]
    names = [name for name in names if name and name != "and"]
    text = f'@misc{{k,\n  title = "{title}",\n  author = {{{" and ".join(names)}}}\n}}\n'
    ((line, entry),) = read_bibtex(text.splitlines(keepends=True) if "\x85" not in text else [text])
    assert line == 1 and isinstance(entry, BibEntry)
    assert plain_text(entry.fields["title"]) == " ".join(title.split())


@given(st.text(st.sampled_from('@misc{},="\\#x \n'), max_size=80))
def test_any_text_gives_entries_or_errors(text: str) -> None:
    for line, entry in read_bibtex(text.splitlines(keepends=True)):
        assert line >= 1
        if isinstance(entry, BibEntry):
            for value in entry.fields.values():
                plain_text(value)
                split_names(value)
