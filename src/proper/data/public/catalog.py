"""Catalog of public data sets: license, source and conversion of each, and `fetch` and `convert` for them.

The package neither contains nor redistributes any of this data. Files get the names and columns that `configs/` use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from proper.console import progress
from proper.data.public import download
from proper.data.public.acl import convert_acl
from proper.data.public.movielens import convert_movielens
from proper.data.public.news import convert_news
from proper.errors import InputError
from proper.files import write_text

logger = logging.getLogger(__name__)

Convert = Callable[[Path, Path, Callable[[], None]], dict[str, int]]
"""`convert(original, folder, step)` writes Parquet files into `folder` and returns the rows of each by file name."""


@dataclass(frozen=True)
class PublicDataset:
    """A data set that is fetched and converted.

    Attributes:
        name: its name in commands, and of its folder below `data/`.
        title: what one row is and which task it is for.
        license: text shown before anything is fetched.
        terms: the license in a few words.
        original: file name of the download.
        source: URL of the file; of a page, if `by_hand`.
        by_hand: whether the source needs an account, so that a person has to download the file.
        publishes_md5: whether the source has an MD5 at the file's URL + ".md5".
        files: names of the converted files.
        verify: check of the download's content.
        convert: conversion of the download.
    """

    name: str
    title: str
    license: str
    terms: str
    original: str
    source: str
    files: tuple[str, ...]
    verify: download.Verify
    convert: Convert
    by_hand: bool = False
    publishes_md5: bool = False


_SETS = (
    PublicDataset(
        name="movielens-small",
        title="rate a film, per user: 100,836 ratings and 3,683 tags by 610 users",
        license="""\
MovieLens ml-latest-small (GroupLens Research, University of Minnesota; https://grouplens.org/datasets/movielens/) is
for research: no commercial or revenue-bearing use without permission of GroupLens, no endorsement by the University of
Minnesota or GroupLens may be stated or implied, publications acknowledge the data (F. M. Harper and J. A. Konstan,
"The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015), and copies carry the same license. There is no
warranty. The whole text is README.txt in the archive. The file goes from GroupLens to this machine.""",
        terms="research use, non-commercial (GroupLens)",
        original="ml-latest-small.zip",
        source="https://files.grouplens.org/datasets/movielens/ml-latest-small.zip",
        files=("ratings.parquet", "tags.parquet"),
        verify=download.require_zip,
        convert=convert_movielens,
        publishes_md5=True,
    ),
    PublicDataset(
        name="huffpost-news",
        title="label an article or write its headline, per author: HuffPost, 2012 to 2022",
        license="""\
News Category Dataset (Rishabh Misra; https://www.kaggle.com/datasets/rmisra/news-category-dataset) is licensed CC BY
4.0 (https://creativecommons.org/licenses/by/4.0/): attribution (R. Misra, "News Category Dataset", arXiv:2209.11429,
2022). The headlines and descriptions in it are HuffPost's.""",
        terms="CC BY 4.0",
        original="News_Category_Dataset_v3.json",
        source="https://www.kaggle.com/datasets/rmisra/news-category-dataset",
        files=("huffpost_news.parquet",),
        verify=download.require_json,
        convert=convert_news,
        by_hand=True,
    ),
    PublicDataset(
        name="acl-titles",
        title="write a paper's title from its abstract, per author: ACL Anthology",
        license="""\
ACL Anthology (Association for Computational Linguistics; https://aclanthology.org) licenses material published in or
after 2016 as CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/) and earlier material as CC BY-NC-SA 3.0
(https://creativecommons.org/licenses/by-nc-sa/3.0/), which the column `license` says per paper. Papers of other
organizers may have terms of their own. The file goes from the Anthology to this machine.""",
        terms="CC BY 4.0; before 2016 CC BY-NC-SA 3.0",
        original="anthology+abstracts.bib.gz",
        source="https://aclanthology.org/anthology+abstracts.bib.gz",
        files=("acl_titles.parquet",),
        verify=download.require_gzip,
        convert=convert_acl,
    ),
)

DATASETS: Mapping[str, PublicDataset] = MappingProxyType({each.name: each for each in _SETS})


def fetch_dataset(dataset: PublicDataset, folder: Path, url: str | None, agree: Callable[[], None]) -> None:
    """Download a data set into `folder` and convert it; what is there already, and unchanged, is kept.

    Args:
        dataset: a data set of the catalog.
        folder: where the download, the Parquet files, `SHA256SUMS` and `LICENSE.txt` are written.
        url: another address of the same file; None for the source.
        agree: called before anything is downloaded; raises if the user does not agree to the license.

    Raises:
        InputError: the source needs an account and no `url` is given, or other files with these names exist.
        ProperError: the file cannot be downloaded, is not the right one, or cannot be converted.
    """
    if all([download.is_present(folder / name) for name in dataset.files]):
        logger.info("%s: already fetched, and unchanged", folder)
        return
    if url is None and dataset.by_hand:
        raise InputError(
            f"{dataset.name}: its site needs an account; download {dataset.original} from {dataset.source}, then run: "
            f"proper data convert {dataset.name} {dataset.original} --out {folder}"
        )
    url = url or dataset.source
    download.require_web_address("--url", url)
    agree()
    original = folder / dataset.original
    download.fetch(url, original, _verifier(dataset, url))
    convert_dataset(dataset, original, folder)


def convert_dataset(dataset: PublicDataset, original: Path, folder: Path) -> None:
    """Convert a downloaded file into the Parquet files of a data set in `folder`, with its license beside them.

    Raises:
        InputError: the file cannot be read as the data set, or other files with the names of its output exist.
    """
    if not original.is_file():
        raise InputError(f"{original}: no such file")
    for name in dataset.files:
        download.is_present(folder / name)
    with progress(f"convert {original.name}", None) as advance:
        written = dataset.convert(original, folder, advance)
    write_text(folder / "LICENSE.txt", f"{dataset.license}\n\nSource: {dataset.source}\n", shared=True)
    for name, rows in written.items():
        logger.info("%s: %s rows", folder / name, f"{rows:,}")


def _verifier(dataset: PublicDataset, url: str) -> download.Verify:
    """Return the check of a download: its content, and its MD5 where one is published."""

    def verify(address: str, file: Path) -> None:
        dataset.verify(address, file)
        if not dataset.publishes_md5:
            return
        expected = download.published_md5(url)
        if expected is None:
            logger.warning("%s.md5: not there, so the file is not compared with a published checksum", url)
        else:
            download.require_md5(address, file, expected)

    return verify
