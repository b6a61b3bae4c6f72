"""What curate.py is made of: it chooses among finished scores, exports what it kept, and shows the choice on a page.

    finished.py     the scores as the scoring script left them: parts, columns, totals
    images.py       the images of kept rows, read again as the scoring script read them
    rules.py        the keys of the section `curate:`, published recipes, and the rules that look at one row
    duplicates.py   the rules that compare rows with each other
    semantic.py     one of them: images that show the same, by their embeddings
    overlaps.py     what each rule would drop alone
    examples.py     the rows that the review page shows of each rule
    labels.py       the statistics of marked pairs: the farthest cut that they prove
    marks.py        labels.csv, and what curate.labels makes of it
    export.py       what is written for trainers: Parquet, an imagefolder, webdataset tars
    review.py, review.html    the review page
    plots.py        the plots next to kept.csv

A run chooses by keys of the section `curate:` in config.yaml. A rule works when its key differs from its default; the
key `export` names one export. No key needs a model.

To add a rule: give it a key in `rules.Curation` (and in config.yaml, with a comment), a name in `rules.RULES` and a
sentence in `rules.RULE_TEXTS`, and write a class with the methods below. `rules.make_row_rules`, `rules.make_image_rules`
or `duplicates.make_neighbour_rules` returns it when the key asks for it.

* A rule that looks at a row's text and score is a `RowRule`.
* A rule that looks at the image itself is an `ImageRule`; the images are read again for it.
* A rule that compares rows with each other is a `NeighbourRule`; it sees only what passed all other rules.

To add an export: write a class with the methods of `Export` in export.py, list it in `export.EXPORTS`, and give its name
to the key `export` in `rules.Curation`.

A column of a further measure needs nothing here: tables, exports and page take their columns from the script.
"""
import pathlib
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from addons.curation.duplicates import ImageFacts, Neighbours
    from addons.curation.export import Exported, KeptRows
    from addons.curation.rules import ScoredRows


class RowRule(Protocol):
    """A rule that judges each row by its caption, its similarity and its status."""

    @property
    def name(self) -> str:
        """The verdict of a row that fails: one of `rules.RULES`."""

    def fails(self, rows: "ScoredRows") -> "np.ndarray":
        """Tell which of n rows fail: bool (n,)."""


class ImageRule(Protocol):
    """A rule that judges each row by its image."""

    @property
    def name(self) -> str:
        """The verdict of a row that fails: one of `rules.RULES`."""

    def fails(self, facts: "ImageFacts") -> bool:
        """Tell whether a row with this image fails."""


class NeighbourRule(Protocol):
    """A rule that judges each row by the others that are still there."""

    @property
    def name(self) -> str:
        """The verdict of a row that fails: one of `rules.RULES`."""

    def find_staying(self, rows: "Neighbours") -> "np.ndarray":
        """For each of n rows, given the best row first, the place of the row that stays for it, its own if it stays: (n,)."""


class Export(Protocol):
    """A form in which the kept rows are written."""

    @property
    def name(self) -> str:
        """The value of the key `export` that asks for it."""

    @property
    def needs_images(self) -> bool:
        """Whether the images are written too, so that they are read again."""

    def write(self, kept: "KeptRows", folder: pathlib.Path) -> "Exported":
        """Write the kept rows below `folder` and tell how many there are.

        Every file is written through `atomic_file`: one that exists is complete, and a rerun goes on from there.
        """
