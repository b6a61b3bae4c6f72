"""What is computed besides the similarity while a partition's embeddings are at hand: one file per measure.

    random_pairs.py   how high captions score that have nothing to do with the image; the columns percentile, random_percentile
    passport.py       a few rows scored again the slow reference way, and by how much the scores differ (`parity_rows`)
    embeddings.py     image and text embeddings saved next to the scores (`save_embeddings`)
    images.py         rows whose URLs end at one file, and images that EXIF would turn, counted
    image_digests.py  a digest of each row's image in the parts, by which curation finds images that were replaced since
    captions.py       how many captions hold HTML entities, or tokens that the tokenizer does not know
    further_models.py the scores of further models in the same pass (`pretrained_model` as a mapping)
    thresholds.py     where others have cut this model's scores, and how many rows pass there
    contrast.py       the similarity less what image and caption score with everything else
    labels.py         what an image shows, by prompts alone
    heads.py          small networks on the image's embedding, such as an aesthetics predictor
    target_embeddings.py    how near each image is to the images of another run
    image_columns.py, drift.py, moments.py    what several measures share; no measures themselves

A run with a model computes every measure whose `wanted(config)` is true. The first eight are always wanted, or have keys of
their own in the config; any other is asked for by its name under `measures`, with its settings:

    measures:
      contrast: {}

To add one, drop one file into this folder:

    class CaptionLength(Measure):
        \"\"\"The column caption_length: how many words each caption has.\"\"\"

        name = "caption_length"
        columns = (Column("caption_length", "float", "words in the caption"),)

        def measure(self, run, scored):
            lengths = [len(caption.split()) for caption in run.captions]
            return Measured({"caption_length": np.array(lengths, np.float32)}, {})

    MEASURE = CaptionLength

That is all for a column that each row has for itself. Settings are a dataclass: `settings = CaptionLengthSettings` has the keys
between the braces checked, and `read_settings` gives them. A measure that says something of the whole run puts numbers
into `Measured.kept`, which are stored in the part; `add_up` makes a total of all parts' numbers (`kept_by` reads those of one
part, and is None in a dry run, where nothing is measured), `describe` its entry in profile.json, `tell` its line on the screen,
and `complete` fills columns that depend on all rows. Files of its own go into `Measured.files`, named after the part
(`partition.folder / "part-00012.npz"`): the part's metadata holds their sha256, and a part without its files is not done.
"""
import difflib
import pathlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from addons.sections import check_section
from image_text_sim_clip import (
    EXIT_CONFIG,
    RESULT_COLUMNS,
    Column,
    Config,
    ImageLoader,
    Json,
    PartitionRun,
    Plan,
    Scored,
    Scorer,
    Trouble,
    column_names,
    room,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


Total = Any  # whatever the measure's own `add_up` returns


class Measured(NamedTuple):
    """What a measure found in one partition."""

    values: "dict[str, np.ndarray]"  # for each of its columns a value per row at hand, (n,); NaN or None for no value
    kept: Json  # goes into the part's metadata: JSON, and the same for the same rows on any machine
    files: Mapping[pathlib.Path, bytes] = MappingProxyType({})  # written next to the part when that is; its metadata binds them
    uncounted_s: float = 0.0  # seconds that stay out of its stage and of the run's pairs/s


class Measure:
    """One thing that is computed besides the similarity; see the top of this file for how to add one.

    A worker makes one object of each class that the run wants and calls `begin` and `measure` for each of its partitions,
    always from the same thread (of images from URLs several may be begun, and they are measured as they are complete);
    `close` comes when it has no more partitions for now (more may follow later). The class methods work on finished parts,
    without a model.
    """

    name: ClassVar[str]  # its key in a part's metadata and in profile.json, and the name of its stage
    columns: ClassVar[tuple[Column, ...]] = ()  # columns of its own in the results
    counts_in_rate: ClassVar[bool] = True  # False: its seconds stay out of the run's pairs/s
    stage: ClassVar[str] = ""  # of the profile, to which its seconds are added; "" for one of its own name
    needs_model: ClassVar[bool] = True  # False: a dry run computes it, too; it may then have no columns and ask no scorer
    settings: ClassVar[type | None] = None  # a dataclass of the keys that may stand under measures.<name> in the config

    @classmethod
    def wanted(cls, config: Config) -> bool:
        """Whether a run with this config computes it: where it is named under `measures`, unless it has a key of its own."""
        return cls.name in (config.measures or {})

    @classmethod
    def read_settings(cls, config: Config) -> Any:
        """The instance of `settings` that the config asks for; None where the measure has none. Trouble (exit 2): a bad key."""
        values = (config.measures or {}).get(cls.name) or {}
        if not isinstance(values, dict):
            raise Trouble(EXIT_CONFIG, f"measures.{cls.name} must be a section of keys, got {values!r}")
        if cls.settings is None:
            if values:
                raise Trouble(EXIT_CONFIG, f"measures.{cls.name} has no settings, got {', '.join(map(str, values))}")
            return None
        return check_section(cls.settings, values, f"measures.{cls.name}")

    @classmethod
    def columns_for(cls, config: Config) -> tuple[Column, ...]:
        """Its columns in a run with this config: `columns`, unless its settings name them."""
        return cls.columns

    scorer: Scorer  # not there in a dry run

    def __init__(self, config: Config, plan: Plan, scorer: "Scorer | None", loader: ImageLoader) -> None:
        """`loader` is the worker's, as the measures before this one have wrapped it."""
        self.config = config
        self.plan = plan
        if scorer:
            self.scorer = scorer

    def wrap(self, loader: ImageLoader) -> ImageLoader:
        """The loader that the worker is to use: this one, or a copy that does something more on the way."""
        return loader

    def begin(self, run: PartitionRun) -> None:
        """Called before the partition's images are loaded, in the order of the partitions, some ahead of `measure`."""

    def measure(self, run: PartitionRun, scored: Scored) -> Measured:
        """Called when the partition's rows are scored and before its part is written."""
        raise NotImplementedError

    def revise(self, run: PartitionRun, table: "pa.Table") -> "pa.Table":
        """The part's table before it is written, all of its rows, also those that --retry-failed has not tried again.

        Called after `measure`; for values that depend on other rows of the partition.
        """
        return table

    def close(self) -> None:
        """Let go of what was held for the partitions begun; `begin` may follow again."""

    @classmethod
    def add_up(cls, parts: Iterable[Json]) -> Total | None:
        """The total of what the parts keep, given as the metadata of all of them; None where there is nothing to add up.

        `kept_by(cls, part)` is what one part keeps: None in a dry run, unless the measure needs no model.
        """
        return None

    @classmethod
    def describe(cls, total: Total) -> Json | None:
        """The entry of profile.json under the measure's name, from what `add_up` returned, which may be None."""
        return None

    @classmethod
    def complete(cls, table: "pa.Table", total: Total) -> "pa.Table":
        """A part's table with those columns filled in that depend on the whole run; `total` may be None."""
        return table

    @classmethod
    def tell(cls, entry: Json) -> str:
        """One line for the summary on the screen, from the entry of profile.json; an empty one for none."""
        return ""


def kept_by(measure: type[Measure], part: Json) -> Json | None:
    """What `measure` put into a part, given the part's metadata; None where it had not been computed."""
    kept: Json | None = part.get("measures", {}).get(measure.name)
    return kept


def find_measures(config: Config) -> list[type[Measure]]:
    """The measures that a run with this config computes, in the order of their files.

    Raises Trouble (exit 2) for a name under `measures` that none in this folder has, and for settings that are wrong.
    """
    measures: list[type[Measure]] = [module.MEASURE for module in room("measures") if hasattr(module, "MEASURE")]
    by_name = {measure.name: measure for measure in measures}
    for name in config.measures or {}:
        if name not in by_name:
            raise Trouble(EXIT_CONFIG, f"measures: {_describe_unknown(str(name), by_name)}")
        by_name[name].read_settings(config)
        if not by_name[name].wanted(config):
            raise Trouble(EXIT_CONFIG, f"measures.{name}: this one has a key of its own, and this config turns it off there")
    wanted = [measure for measure in measures if measure.wanted(config)]
    _refuse_equal_columns(config, wanted)
    return wanted


def _refuse_equal_columns(config: Config, measures: list[type[Measure]]) -> None:
    """Trouble (exit 2) where two columns of the results would have the same name, such as a label and a head."""
    taken = dict.fromkeys(column_names(RESULT_COLUMNS), "every result")
    for measure in measures:
        for name in column_names(measure.columns_for(config)):
            if name in taken:
                raise Trouble(EXIT_CONFIG, f"measures.{measure.name}: {taken[name]} has a column {name!r} already; take "
                                           "another name")
            taken[name] = f"measures.{measure.name}"


def _describe_unknown(name: str, known: dict[str, type[Measure]]) -> str:
    """Say that no measure is called `name`, and which file holds the one with the nearest name."""
    nearest = difflib.get_close_matches(name, known, 1, 0.5)
    if not nearest:
        return f"there is no {name!r} in addons/measures/, which has {', '.join(sorted(known))}"
    file = known[nearest[0]].__module__.rpartition(".")[2]
    return f"there is no {name!r} in addons/measures/; did you mean {nearest[0]!r} (addons/measures/{file}.py)?"
