"""Marked pairs: the bound they give, which marks count, and the cut that curate.py makes of them."""
import itertools
import json
import math
import pathlib

import numpy as np
import pytest
from conftest import Outcome
from finished_run import write_finished_run

import curate
import image_text_sim_clip as script
from addons.curation import labels, marks, review
from addons.curation.labels import Goal, Marks, Proof, Shortfall
from addons.measures.random_pairs import Histogram

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRECISION = Goal("precision", 0.95)


# ── Tables whose truth is known, and somebody who marks them ──────────────────────────────────────────────────────────

def make_table(shape, rows, rng):
    """Similarities, float32, and whether each row fits: (rows,) both."""
    share, fitting, other = {
        "well apart": (0.7, (0.30, 0.05), (0.18, 0.05)), "little fits": (0.4, (0.32, 0.05), (0.15, 0.05)),
        "clean": (0.97, (0.30, 0.05), (0.20, 0.05)), "rare": (0.08, (0.35, 0.04), (0.15, 0.05)),
        "ties": (0.7, (0.30, 0.05), (0.18, 0.05)), "skewed": (0.6, None, None)}[shape]
    fits = rng.random(rows) < share
    if shape == "skewed":
        scores = np.where(fits, 1 - rng.gamma(2, 0.1, rows), 0.2 + rng.gamma(2, 0.08, rows))
    else:
        scores = np.where(fits, rng.normal(*fitting, rows), rng.normal(*other, rows))
    if shape == "ties":
        scores = scores.round(2)
    return scores.clip(-1, 1).astype(np.float32), fits


def cells_of(similarities):
    histogram = Histogram()
    histogram.add(similarities)
    return labels.make_cells(histogram.counts)


def queues_of(similarities, cells, wanted=2000):
    """Of each cell the rows on the page that have a turn, in turn."""
    rows = review.choose_sample(lambda: [similarities], wanted)
    rows = rows[np.argsort(review.scatter(rows))]
    limits = review.find_limits(cells, lambda: [similarities], rows)
    places = cells.find(similarities[rows])
    in_turn = review.scatter(rows) < limits[places]
    return [rows[in_turn & (places == cell)].tolist() for cell in range(len(cells.rows))]


def divergence(seen, allowed):
    if seen >= allowed:
        return 0.0
    return (seen * math.log(seen / allowed) if seen else 0) + (1 - seen) * math.log((1 - seen) / (1 - allowed))


def find_frontier(cells, marked, misfits, goal):
    """The last cell that the page asks for: `findFrontier` of review.html."""
    if goal.kind == "recall":
        return len(cells.rows) - 1
    allowed = 1 - goal.share
    reach = np.cumsum(cells.rows)
    expected = np.cumsum(misfits / np.maximum(1, marked) * cells.rows) / reach
    effective = np.minimum.accumulate(marked / cells.rows) * reach
    likely = [i for i in range(len(reach)) if 1.7 * effective[i] * divergence(expected[i], allowed) >= 3.7]
    if likely:
        return min(likely[-1] + 1, len(reach) - 1)
    frontier = int(np.argmax(reach >= 0.2 * reach[-1]))
    while frontier > 0 and effective[frontier] >= 25 and expected[frontier] > 1.2 * allowed:
        frontier -= 1
    return frontier


def mark_in_turn(cells, queues, fits, goal, wanted):
    """Mark what the page proposes (`propose` of review.html) truthfully, `wanted` times: row numbers in that order."""
    marked = np.zeros(len(queues), int)
    misfits = np.zeros(len(queues), int)
    rows = []
    while len(rows) < wanted:
        still = [i for i, queue in enumerate(queues) if marked[i] < len(queue)]
        if not still:
            break
        frontier = max(find_frontier(cells, marked, misfits, goal), still[0])
        cell = min((i for i in still if i <= frontier), key=lambda i: (marked[i] + 0.5) / cells.rows[i])
        row = queues[cell][marked[cell]]
        rows.append(row)
        marked[cell] += 1
        misfits[cell] += not fits[row]
    return np.array(rows, np.int64)


def label(shape, seed, goal=PRECISION, rows=20_000, wanted=400, noise=0.0):
    """One labelling: (rows kept, of them those that fit, rows that fit in all, rows that an oracle keeps)."""
    rng = np.random.default_rng(seed)
    similarities, fits = make_table(shape, rows, rng)
    cells = cells_of(similarities)
    said = fits ^ (rng.random(rows) < noise)
    marked = mark_in_turn(cells, queues_of(similarities, cells), said, goal, wanted)
    order = np.argsort(review.scatter(marked))
    sample = Marks(marked[order], said[marked[order]].astype(np.int8), similarities[marked[order]].astype(float))
    found = labels.prove_cut(cells, sample, goal)
    nothing = 0 if goal.kind == "precision" else len(cells.rows)
    kept = cells.find(similarities) < (found.kept if isinstance(found, Proof) else nothing)
    return int(kept.sum()), int(fits[kept].sum()), int(fits.sum()), find_oracle(similarities, fits, goal)


def find_oracle(similarities, fits, goal):
    """How many rows the best threshold keeps for one who knows the truth."""
    order = np.argsort(-similarities, kind="stable")
    fitting = np.cumsum(fits[order])
    is_edge = np.append(np.diff(similarities[order]) != 0, True)
    if goal.kind == "precision":
        reached = np.flatnonzero(is_edge & (fitting >= goal.share * np.arange(1, len(order) + 1)))
        return int(reached[-1]) + 1 if len(reached) else 0
    return int(np.flatnonzero(is_edge & (fitting >= goal.share * fitting[-1]))[0]) + 1


# ── The bound ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def chance_of(outcome, rows, fitting):
    """The probability of this sequence of draws, without replacement, from `rows` of which `fitting` fit."""
    chance = 1.0
    for drawn, fits in enumerate(outcome):
        left = fitting - sum(outcome[:drawn])
        chance *= (left if fits else rows - drawn - left) / (rows - drawn)
    return chance


@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.3, -0.7)])
def test_no_allocation_can_expect_to_gain(factors):
    """Summed over all that can be drawn, the expected stake is at most 1 under every allocation of the null hypothesis."""
    rows = np.array([6, 5])
    drawn = (3, 4)
    most = 7.0 if factors[1] > 0 else 0.0
    outcomes = list(itertools.product(*(itertools.product((0, 1), repeat=n) for n in drawn)))
    strata = np.repeat([0, 1], drawn)
    stakes = [math.exp(labels.log_stake(labels.count_marks(rows, strata, np.array([*first, *second], bool)),
                                        np.array(factors), most)) for first, second in outcomes]
    tried = 0
    for allocation in itertools.product(range(7), range(6)):
        if np.dot(factors, allocation) > most:
            continue
        chances = [chance_of(first, 6, allocation[0]) * chance_of(second, 5, allocation[1]) for first, second in outcomes]
        assert sum(chances) == pytest.approx(1)
        assert sum(chance * stake for chance, stake in zip(chances, stakes, strict=True) if chance) <= 1 + 1e-9
        tried += 1
    assert tried > 10


@pytest.mark.timeout(600)
def test_bound_holds_whenever_marking_stops():
    """Somebody who looks again and again and stops at the first proof is misled in at most 5 % of tables where it is false."""
    rng = np.random.default_rng(2)
    rows = np.array([300, 500])
    misled = 0
    for _ in range(60):
        truth = [rng.permutation(np.arange(300) < 297), rng.permutation(np.arange(500) < 462)]  # 94.9 % fit
        marked = [0, 0]
        for _ in range(60):
            marked[rng.integers(2)] += 2
            strata = np.repeat([0, 1], marked)
            fits = np.concatenate([truth[0][:marked[0]], truth[1][:marked[1]]])
            if labels.log_stake(labels.count_marks(rows, strata, fits), np.ones(2), 0.95 * 800 - 1) >= math.log(20):
                misled += 1
                break
    assert misled <= 0.05 * 60


def test_all_rows_marked_prove_the_truth():
    """Where every row is marked nothing is left to chance: the cut is the oracle's, up to the steps of the cells."""
    similarities, fits = make_table("well apart", 600, np.random.default_rng(4))
    cells = cells_of(similarities)
    order = np.argsort(review.scatter(np.arange(600)))
    found = labels.prove_cut(cells, Marks(order, fits[order].astype(np.int8), similarities[order].astype(float)), PRECISION)
    reach = np.cumsum(cells.rows)
    wanted = [kept for kept in range(1, len(reach) + 1) if fits[cells.find(similarities) < kept].mean() >= 0.95]
    assert isinstance(found, Proof)
    assert found.kept == wanted[-1]


def test_one_clean_cell_proves_little():
    """A few dozen marks that all fit are too few for 95 %; the shortfall says how many more, and that number is enough."""
    similarities = np.random.default_rng(5).normal(0.3, 0.05, 50_000).astype(np.float32)
    cells = cells_of(similarities)
    queues = queues_of(similarities, cells)
    fits = np.ones(50_000, bool)

    def prove(rows):
        rows = rows[np.argsort(review.scatter(rows))]
        return labels.prove_cut(cells, Marks(rows, np.ones(len(rows), np.int8), similarities[rows].astype(float)), PRECISION)
    first = mark_in_turn(cells, queues, fits, PRECISION, 30)
    short = prove(first)
    assert isinstance(short, Shortfall)
    assert short.more is not None
    assert 20 < short.more < 250
    share = 1.1 * (30 + short.more) / cells.rows[:short.kept].sum()
    more = [queue[:math.ceil(share * rows)] for queue, rows in zip(queues, cells.rows[:short.kept], strict=False)]
    assert isinstance(prove(np.unique(np.concatenate([first, *more]))), Proof)


def test_marks_that_speak_against_are_told_so():
    """Where one pair in five does not fit, no number of such marks proves 95 %."""
    rng = np.random.default_rng(6)
    similarities = rng.normal(0.3, 0.05, 5000).astype(np.float32)
    rows = np.argsort(review.scatter(np.arange(5000)))[:300]
    sample = Marks(rows, (rng.random(300) < 0.8).astype(np.int8), similarities[rows].astype(float))
    found = labels.prove_cut(cells_of(similarities), sample, PRECISION)
    assert isinstance(found, Shortfall)
    assert found.more is None


def test_unsure_counts_against():
    """A mark `unsure` is worth no more than `does_not_fit` for precision, and no more than either for recall."""
    similarities, fits = make_table("well apart", 600, np.random.default_rng(4))
    cells = cells_of(similarities)
    order = np.argsort(review.scatter(np.arange(600)))
    truth = fits[order].astype(np.int8)
    doubtful = np.where(np.arange(600) % 12 == 0, -1, truth).astype(np.int8)

    def kept(said, goal):
        found = labels.prove_cut(cells, Marks(order, said, similarities[order].astype(float)), goal)
        return found.kept if isinstance(found, Proof) else {"precision": 0, "recall": len(cells.rows)}[goal.kind]
    assert kept(doubtful, Goal("precision", 0.9)) == kept(np.maximum(doubtful, 0), Goal("precision", 0.9))
    assert kept(doubtful, Goal("recall", 0.9)) >= kept(truth, Goal("recall", 0.9))
    assert kept(doubtful, Goal("recall", 0.9)) >= kept(np.maximum(doubtful, 0), Goal("recall", 0.9))


def test_cells_depend_on_the_scores_alone():
    """Cells are the whole table, none empty, with all of the error set aside; also of one score, and of none."""
    for similarities in (make_table("ties", 5000, np.random.default_rng(1))[0], np.full(50, 0.25, np.float32),
                         np.array([-1, 1], np.float32)):
        cells = cells_of(similarities)
        assert cells.rows.sum() == len(similarities)
        assert (cells.rows > 0).all()
        assert np.bincount(cells.find(similarities), minlength=len(cells.rows)).tolist() == cells.rows.tolist()
        assert cells.precision_errors.sum() == pytest.approx(1)
        assert cells.recall_errors.sum() == pytest.approx(1)
    assert len(cells_of(np.zeros(0, np.float32)).rows) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_labellings_keep_the_promise():
    """400 truthful marks: the precision asked for holds in 94 % of 1,000 labellings, of five shapes of tables, and 60 % of
    the rows that an oracle would keep are kept in each shape."""
    promised = []
    for shape in ("well apart", "little fits", "clean", "ties", "skewed"):
        results = [label(shape, seed) for seed in range(200)]
        promised += [fitting >= 0.95 * kept for kept, fitting, _, _ in results]
        shares = [kept / oracle for kept, _, _, oracle in results]
        print(f"{shape}: {np.mean(promised[-200:]):.3f} hold, {np.mean(shares):.2f} of the oracle's rows")
        assert np.mean(shares) >= 0.6, shape
    assert len(promised) == 1000
    assert np.mean(promised) >= 0.94


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_noise_keeps_fewer():
    """Marks of which 2 % are wrong break no promise, and keep fewer rows."""
    true = [label("little fits", seed) for seed in range(40)]
    noisy = [label("little fits", seed, noise=0.02) for seed in range(40)]
    assert all(fitting >= 0.95 * kept for kept, fitting, _, _ in noisy)
    assert sum(kept for kept, *_ in noisy) < sum(kept for kept, *_ in true)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_recall_holds():
    """min_recall 0.9 keeps nine tenths of what fits in 94 % of the labellings, and drops most of what an oracle would."""
    goal = Goal("recall", 0.9)
    for shape in ("well apart", "little fits", "skewed"):
        results = [label(shape, seed, goal) for seed in range(40)]
        assert np.mean([fitting >= 0.9 * all_fitting for _, fitting, all_fitting, _ in results]) >= 0.94
        assert np.mean([(20_000 - kept) / (20_000 - oracle) for kept, *_, oracle in results]) >= 0.6, shape


def test_weighting_is_needed():
    """Of the pairs on the page that have a turn the plain share that fits misleads; weighted by cell it does not."""
    rng = np.random.default_rng(7)
    similarities = np.concatenate([rng.normal(0.2, 0.01, 20_000), rng.uniform(0.3, 0.6, 9000)]).astype(np.float32)
    fits = rng.random(29_000) < np.where(similarities < 0.3, 0.5, 1.0)
    cells = cells_of(similarities)
    rows = np.concatenate(queues_of(similarities, cells, 1000))
    sample = Marks(rows, fits[rows].astype(np.int8), similarities[rows].astype(float))
    weighted = marks.estimate_share(cells, sample, PRECISION, len(cells.rows))
    assert abs(fits[rows].mean() - fits.mean()) > 0.15
    assert weighted is not None
    assert abs(weighted - fits.mean()) < 0.08


# ── The file, and curate.py ───────────────────────────────────────────────────────────────────────────────────────────

def write_labels(path, rows, fits, similarities):
    words = np.where(fits, "fits", "does_not_fit")
    lines = [f"{row},{words[row]},2026-01-01T00:00:00Z,{float(similarities[row])!r}" for row in rows]
    path.write_text("\n".join(["row,label,when,similarity", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def run_labels(tmp_path, monkeypatch, capfd, write_config):
    """Run curate.main with labels.csv of tmp_path: run_labels(min_precision=0.9)."""
    def run(config=None, **keys):
        keys = {"labels": str(tmp_path / "labels.csv")} | keys
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(curate, "draw_plots", lambda *_: None)
            try:
                code = curate.main(["--config", str(config or write_config()),
                                    *(f"--set=curate.{key}={json.dumps(value)}" for key, value in keys.items())])
            except script.Trouble as trouble:
                script.say(f"error: {trouble}")
                code = trouble.exit_code
        return Outcome(code, *capfd.readouterr())
    return run


@pytest.fixture
def table(tmp_path):
    """A finished run of 3,000 rows whose truth is known, of which 500 are marked in turn: (similarities, fits, rows marked)."""
    similarities, fits = make_table("well apart", 3000, np.random.default_rng(8))
    similarities[::50] = np.nan
    write_finished_run(tmp_path / "out", similarities)
    scored = similarities[~np.isnan(similarities)]
    cells = cells_of(scored)
    rows = mark_in_turn(cells, queues_of(similarities, cells), fits, PRECISION, 500)
    write_labels(tmp_path / "labels.csv", rows, fits, similarities)
    return similarities, fits, rows


def test_marks_cut_the_table(tmp_path, table, run_labels, read_table):
    """min_precision cuts where the marks prove it, and says the cut, the bound, the estimate and the rows."""
    similarities, fits, _ = table
    outcome = run_labels(min_precision=0.95)
    assert outcome.code == 0, outcome.stderr
    proved = outcome.result["labels"]
    kept = [int(row["url"].removesuffix(".png")) for row in read_table(tmp_path / "out/curated/kept.csv")]
    dropped = read_table(tmp_path / "out/curated/dropped.csv")
    assert kept == np.flatnonzero(similarities >= proved["similarity"]).tolist()
    assert fits[kept].mean() >= 0.95
    assert len(kept) == proved["rows_at_or_above"] == outcome.result["kept"] > 1000
    assert {row["dropped_by"] for row in dropped} == {"not_scored", "min_precision"}
    assert (proved["goal"], proved["share"], proved["confidence"], proved["marks"]) == ("min_precision", 0.95, 0.95, 500)
    assert proved["estimate"] > 0.95
    assert f"at least 95 % of the {len(kept):,} rows at or above {proved['similarity']:.4f} fit, with 95 %" in outcome.stderr
    assert json.loads((tmp_path / "out/curated/curated.json").read_text())["labels"] == proved


def test_too_few_marks_are_refused(tmp_path, table, run_labels):
    """With too few marks one line says how many more, and near which score: exit code 2, and nothing is written."""
    similarities, fits, rows = table
    write_labels(tmp_path / "labels.csv", rows[:25], fits, similarities)
    outcome = run_labels(min_precision=0.95)
    assert outcome.code == 2
    assert outcome.stderr.count("\n") == 1
    assert "more marks at similarities of 0." in outcome.stderr
    assert not (tmp_path / "out/curated/kept.csv").exists()


def test_marks_of_other_rows_are_told(tmp_path, table, run_labels):
    """Marks of rows that are not there, have no score or another one, or came out of turn, are counted and left out."""
    similarities, fits, rows = table
    path = write_labels(tmp_path / "labels.csv", rows, fits, similarities)
    late = int(np.setdiff1d(np.flatnonzero(~np.isnan(similarities)), rows)[np.argmax(
        review.scatter(np.setdiff1d(np.flatnonzero(~np.isnan(similarities)), rows)))])
    with path.open("a") as file:
        file.write(f"3000,fits,,0.3\n999999999999,fits,,0.3\n50,fits,,0.3\n{late},fits,,\n{rows[-1]},fits,,0.1234\n")
    outcome = run_labels(min_precision=0.9)
    assert outcome.code == 0, outcome.stderr
    for told in ("2 of 504 marks are of rows that are not in this run", "1 of 504 marks are of rows without a score",
                 "1 of 504 marks are of rows whose score has changed since", "1 of 504 marks were made out of turn"):
        assert told in outcome.stderr, told
    assert sum(outcome.result["labels"]["left_out"].values()) + outcome.result["labels"]["marks"] == 504


def test_picked_marks_prove_nothing(tmp_path, table, run_labels):
    """Marks of pairs that somebody picked because they fit are out of turn: they cannot prove a cut."""
    similarities, fits, _ = table
    picked = np.flatnonzero(fits & ~np.isnan(similarities))[:1500]
    write_labels(tmp_path / "labels.csv", picked, fits, similarities)
    outcome = run_labels(min_precision=0.95)
    assert outcome.code == 2
    assert "made out of turn" in outcome.stderr
    assert "labels_drawn: at_random" in outcome.stderr


def test_a_random_sample_of_ones_own(tmp_path, table, run_labels):
    """Rows that the user drew at random count all, when the config says so."""
    similarities, fits, _ = table
    rows = np.random.default_rng(3).choice(np.flatnonzero(~np.isnan(similarities)), 700, replace=False)
    write_labels(tmp_path / "labels.csv", rows, fits, similarities)
    outcome = run_labels(min_precision=0.9, labels_drawn="at_random")
    assert outcome.code == 0, outcome.stderr
    assert outcome.result["labels"]["marks"] == 700
    kept = similarities >= outcome.result["labels"]["similarity"]
    assert fits[kept].mean() >= 0.9
    assert kept.sum() > 1000


def test_recall_cuts_the_table(tmp_path, table, run_labels):
    """min_recall keeps that share of all rows that fit."""
    similarities, fits, _ = table
    scored = ~np.isnan(similarities)
    cells = cells_of(similarities[scored])
    goal = Goal("recall", 0.9)
    rows = mark_in_turn(cells, queues_of(similarities, cells), fits, goal, 700)
    write_labels(tmp_path / "labels.csv", rows, fits, similarities)
    outcome = run_labels(min_recall=0.9)
    assert outcome.code == 0, outcome.stderr
    kept = similarities >= outcome.result["labels"]["similarity"]
    assert fits[kept].sum() >= 0.9 * fits[scored].sum()
    assert kept.sum() < 0.9 * scored.sum()
    assert "hold at least 90 % of all that fit" in outcome.stderr


def test_all_that_fits(tmp_path, table, run_labels):
    """min_recall: 1 with every row marked keeps every row that fits, and drops some others."""
    similarities, fits, _ = table
    scored = np.flatnonzero(~np.isnan(similarities))
    write_labels(tmp_path / "labels.csv", scored, fits & (similarities > 0), similarities)
    outcome = run_labels(min_recall=1)
    assert outcome.code == 0 and "Warning" not in outcome.stderr, outcome.stderr
    lowest = similarities[scored][(fits & (similarities > 0))[scored]].min()
    assert np.nanmin(similarities) < outcome.result["labels"]["similarity"] <= lowest


@pytest.mark.parametrize(("text", "words"), [
    ("row,label\n1,good\n", ["line 2", "fits | does_not_fit | unsure", "'good'"]),
    ("row,label\nx,fits\n", ["line 2", "whole number"]), ("row,label\n-1,fits\n", ["line 2"]),
    ("row,label,similarity\n1,fits,high\n", ["line 2"]), ("url,caption\na,b\n", ["columns row and label"]),
    ("", ["it takes about"]), ("row,label\n", ["it takes about"]), (b"row,label\n\xff,fits\n", ["cannot be read"]),
    ("row,label\n1\n", ["line 2"]), (None, ["no such file"])])
def test_a_flawed_file_is_one_line(tmp_path, table, run_labels, text, words):
    """A file that is missing, or no labels.csv, is exit code 2 and one line that says where."""
    path = tmp_path / "labels.csv"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    outcome = run_labels(min_precision=0.9)
    assert outcome.code == 2
    assert outcome.stderr.count("\n") == 1
    assert all(word in outcome.stderr for word in words), outcome.stderr


@pytest.mark.parametrize(("keys", "word"), [
    ({}, "needs one of"), ({"min_precision": 0.9, "min_recall": 0.9}, "needs one of"),
    ({"labels": None, "min_recall": 0.9}, "needs curate.labels"), ({"min_precision": 1.5}, "[0, 1]"),
    ({"labels_drawn": "x", "min_precision": 0.9}, "by_page | at_random")])
def test_half_a_request_is_one_line(tmp_path, table, run_labels, keys, word):
    """labels needs a goal, a goal needs labels, and two goals contradict each other: exit code 2."""
    outcome = run_labels(**keys)
    assert outcome.code == 2
    assert word in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_a_spreadsheet_may_touch_the_file(tmp_path, table, run_labels):
    """A byte order mark, Windows line ends, quotes and rounded similarities change nothing; of two marks the last counts."""
    expected = run_labels(min_precision=0.9).result["labels"]
    path = tmp_path / "labels.csv"
    header, *lines = path.read_text().splitlines()
    rounded = [[*line.split(",")[:3], f"{float(line.split(',')[3]):.7f}"] for line in lines]
    again = [rounded[0][0], "unsure", "", ""]
    text = "\r\n".join([header, *(",".join(f'"{cell}"' for cell in line) for line in [again, *rounded])])
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert run_labels(min_precision=0.9).result["labels"] == expected


def test_table_without_scores(tmp_path, run_labels):
    """A table of which no row has a score cannot be cut by marks: one line."""
    write_finished_run(tmp_path / "out", [math.nan])
    (tmp_path / "labels.csv").write_text("row,label\n0,fits\n")
    outcome = run_labels(min_precision=0.9)
    assert outcome.code == 2
    assert "no row of" in outcome.stderr
