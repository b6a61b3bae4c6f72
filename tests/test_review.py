"""The review page, opened from the disk in a real headless Chromium."""
import csv
import itertools
import json
import math
import pathlib

import numpy as np
import pytest
from conftest import BUNDLED_MODEL
from finished_run import write_finished_run
from hypothesis import given, settings
from hypothesis import strategies as st

import curate
import image_text_sim_clip as script
from addons.curation import examples, labels, review
from addons.curation.duplicates import Dropped
from addons.curation.rules import RULES, VERDICTS

ROOT = pathlib.Path(__file__).resolve().parent.parent
HOSTILE = ["<script>window.hacked = 1</script>", "</script><img src=x onerror=\"window.hacked = 1\">", "<!-- <script> ]]>",
           "{{DATA}} {{CSP}}", "\u2028\u2029\u202e right to left", "&lt;b&gt; &amp;", "' onmouseover='window.hacked=1"]


# ── Without a browser ─────────────────────────────────────────────────────────────────────────────────────────────────

@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(0, 400))
@settings(deadline=None, max_examples=100)
def test_sample_is_shared_out_evenly(counts, wanted):
    """As many as wanted are taken (or all), none from where there are none, and small bins are taken whole first."""
    counts = np.array(counts)
    quotas = review.share_out(counts, wanted)
    assert quotas.sum() == min(wanted, counts.sum())
    assert (quotas <= counts).all()
    assert all(quota >= quotas.max() - 1 for quota, count in zip(quotas, counts, strict=True) if quota < count)


def test_sample_does_not_depend_on_the_cut():
    """The same rows are shown however the table is cut; each is scored, and scores are spread evenly."""
    similarities = np.random.default_rng(1).normal(0.2, 0.05, 20_000).astype(np.float32)
    similarities[::7] = np.nan
    samples = [review.choose_sample(lambda size=size: np.split(similarities, range(size, 20_000, size)), 500)
               for size in (100, 4999, 20_000)]
    assert all(sample.tolist() == samples[0].tolist() for sample in samples)
    assert len(samples[0]) == len(set(samples[0].tolist())) == 500
    chosen = similarities[samples[0]]
    assert np.isfinite(chosen).all()
    assert chosen.std() > 1.2 * np.nanstd(similarities)  # flatter than the table's own distribution


@given(st.text(max_size=80))
@settings(deadline=None)
def test_embedded_json_cannot_end_its_element(text):
    """No <, >, & or line separator of a text survives as such, and JSON.parse gives the text back."""
    embedded = review.embed_json({"caption": text})
    assert not set("<>&\u2028\u2029") & set(embedded)
    if text.isprintable():
        assert json.loads(embedded)["caption"] == text.encode("utf-8", "replace").decode()


# ── In Chromium ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def open_page(browser):
    """Open a page from the disk, wait until it is ready; at the end: no console message, no error, no request but itself."""
    opened, said, requests = [], [], []

    def open_(path, width=1200, height=900, colours="light"):
        page = browser.new_page()
        opened.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=colours)
        page.goto(path.as_uri())
        page.wait_for_function("document.documentElement.dataset.readyMs", timeout=20_000)
        return page
    yield open_
    pages = {page.url for page in opened}
    for page in opened:
        assert page.evaluate("window.hacked") is None
        page.evaluate("localStorage.clear()")
        page.close()
    assert said == []
    assert [url for url in requests if url not in pages and not url.startswith("data:")] == []


def write_page(folder, monkeypatch, **keys):
    """Curate the finished run in `folder`/out with the drawings as its images, and return the page's path."""
    (folder / "config.yaml").write_text(json.dumps({
        "image_path": str(ROOT / "challenge_set/shapes"), "output_path": str(folder / "out"),
        "curate": {"review": True} | keys}))
    with monkeypatch.context() as patch:
        patch.setattr(curate, "draw_plots", lambda *_: None)
        assert curate.main(["--config", str(folder / "config.yaml")]) == 0
    return folder / "out/curated/review.html"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A page of 900 rows: hostile captions among them, failures of two kinds, and what its numbers should be."""
    folder = tmp_path_factory.mktemp("review")
    rng = np.random.default_rng(3)
    similarities = rng.normal(0.5, 0.1, 900).clip(-1, 1).astype(np.float32)
    similarities[10:50] = np.nan
    captions = [f"drawing number {n}" for n in range(900)]
    captions[100:100 + len(HOSTILE)], captions[11] = HOSTILE, "<b>a failed one</b>"
    similarities[100:100 + len(HOSTILE)] = 0.9
    sources = [f"shape-{n % 200:03d}.png" for n in range(900)]
    statuses = ["ok"] * 10 + ["missing"] * 30 + ["corrupt"] * 10 + ["ok"] * 850
    random = rng.normal(0.1, 0.1, 5000).clip(-1, 1).astype(np.float32)
    write_finished_run(folder / "out", similarities, captions, sources, statuses, random=random)
    monkeypatch = pytest.MonkeyPatch()
    page = write_page(folder, monkeypatch, max_random_rate=0.01)
    return page, similarities[~np.isnan(similarities)], random


def verdict(page):
    return page.inner_text("#verdict")


def cards(page, side):
    return page.locator(f"#{side} .cards li")


def scores(page, side):
    return [float(text) for text in page.locator(f"#{side} .score").all_inner_texts()]


@pytest.mark.slow
def test_slider_counts_the_whole_table(table, open_page):
    """Wherever the slider stands, the rows that stay and the random pairs that pass are counted from the full data."""
    path, similarities, random = table
    page = open_page(path)
    low, high = (int(page.get_attribute("#slider", name)) for name in ("min", "max"))
    for step in (low, low + 300, (low + high) // 2, high - 200, high):
        page.locator("#slider").fill(str(step))
        threshold = -1 + step / 2048
        stay, passing = (similarities >= threshold).sum(), (random >= threshold).mean()
        text = verdict(page)
        assert text.startswith(f"{stay:,} row{'' if stay == 1 else 's'} stay{'s' if stay == 1 else ''}, ")
        assert f"of {len(similarities)} scored" in text
        shown = float(text.split("; ")[1].split(" %")[0])
        assert math.isclose(shown, 100 * passing, rel_tol=0.06, abs_tol=0.006), text
        assert float(page.input_value("#exact")) == pytest.approx(threshold, abs=1e-4)


@pytest.mark.slow
def test_opens_at_the_chosen_cut(table, open_page):
    """The page begins at the rule's threshold, what the rules did is in its table, and a button leads back."""
    path, similarities, _ = table
    page = open_page(path)
    kept = int(page.inner_text("#rules tr:nth-child(2) td.number"))
    assert verdict(page).startswith(f"{kept} rows stay")
    assert (similarities >= float(page.inner_text("#config-line").split()[1])).sum() == kept
    assert not page.locator("#back").is_visible()
    page.fill("#exact", "0.7")
    assert not verdict(page).startswith(f"{kept} rows")
    page.click("#back")
    assert verdict(page).startswith(f"{kept} rows stay")


@pytest.mark.slow
def test_pairs_are_sorted_around_the_threshold(table, open_page):
    """Above and below stand the pairs nearest to the threshold, the nearest first, with their images; more on demand."""
    path, similarities, _ = table
    page = open_page(path)
    page.fill("#exact", "0.5")
    threshold = float(page.inner_text("#config-line").split()[1])
    ordered = np.sort(similarities)
    above, below = ordered[ordered >= threshold][:12], ordered[ordered < threshold][::-1][:12]
    assert scores(page, "above") == pytest.approx(above, abs=6e-5)
    assert scores(page, "below") == pytest.approx(below, abs=6e-5)
    assert page.locator("#above img").count() == 12
    page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth > 20)")
    page.click("#below > button")
    assert cards(page, "below").count() == 36


@pytest.mark.slow
def test_filters(table, open_page):
    """Text, rule and status narrow the pairs; a failing status shows its examples with their reason."""
    page = open_page(table[0])
    page.fill("#text", "NUMBER 12")
    wanted = [n for n in range(900) if f"number {n}".startswith("number 12") and not 10 <= n < 50]
    assert page.inner_text("#found").startswith(f"{len(wanted)} pairs of the sample")
    assert all("number 12" in text for text in page.locator(".cards .caption").all_inner_texts())
    page.fill("#text", "")
    page.select_option("#rule", "max_random_rate")
    assert cards(page, "above").count() == 0 and cards(page, "below").count() == 12
    page.select_option("#rule", "")
    page.select_option("#status", "missing")
    assert page.inner_text("#found") == "24 examples"
    assert cards(page, "above").count() == 12 and not page.locator("#below").is_visible()
    assert "missing" in cards(page, "above").first.inner_text()
    assert page.locator("#failures summary").all_inner_texts() == ["corrupt: 10 rows", "missing: 30 rows"]


def test_examples_are_chosen_by_number_alone():
    """Of each rule the rows with the smallest scattered numbers; of a rule between rows groups, who stays first."""
    rng = np.random.default_rng(4)
    names = ("kept", "not_scored", "min_similarity", "image_size")
    verdicts = rng.choice([VERDICTS[name] for name in names], 5000).astype(np.uint8)
    verdicts[rng.choice(5000, 600, replace=False)] = VERDICTS["duplicate_image"]
    rows = np.flatnonzero(verdicts == VERDICTS["duplicate_image"])
    stays = rng.choice(np.flatnonzero(verdicts == VERDICTS["kept"]), 40)[np.arange(len(rows)) % 40]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "CHUNK", 700)
        found = examples.choose_examples(verdicts, {"duplicate_image": Dropped(rows, stays)}, review.scatter)
    by_rule = {example.rule: example for example in found}
    assert list(by_rule) == [name for name in RULES if name in ("min_similarity", "image_size", "duplicate_image")]
    dropped = np.flatnonzero(verdicts == VERDICTS["image_size"])
    first = sorted(dropped[np.argsort(review.scatter(dropped))][:examples.ROWS].tolist())
    assert by_rule["image_size"].row_numbers() == first and not by_rule["image_size"].is_between_rows
    groups = by_rule["duplicate_image"].groups
    assert len(groups) == examples.GROUPS
    for stays_here, *members in groups:
        assert members == rows[stays == stays_here][:examples.MEMBERS - 1].tolist()


@pytest.mark.slow
def test_examples_of_each_rule(tmp_path, monkeypatch, open_page):
    """The page shows rows that each rule dropped, also where the sample has none, and groups with the row that stays first."""
    similarities = np.linspace(0.9, 0.1, 60, dtype=np.float32)
    captions = [HOSTILE[n % len(HOSTILE)] if n >= 40 else f"drawing {n % 10}" for n in range(60)]
    write_finished_run(tmp_path / "out", similarities, captions, [f"shape-{n:03d}.png" for n in range(60)])
    path = write_page(tmp_path, monkeypatch, review_rows=3, min_similarity=0.3, duplicate_captions="exact")
    page = open_page(path, 390, 800, "dark")
    summaries = page.locator("#examples summary")
    assert summaries.all_inner_texts() == ["min similarity: 12 rows", "duplicate caption: 8 groups"]
    summaries.nth(0).click()
    page.locator("#examples .score").nth(11).wait_for()
    below = page.locator("#examples details").nth(0).locator(".score").all_inner_texts()
    assert len(below) == 12 and max(map(float, below)) < 0.3
    summaries.nth(1).press("Enter")
    groups = page.locator("#examples details").nth(1).locator("ul")
    groups.nth(7).wait_for()
    assert groups.count() == 8
    for number in range(8):
        badges = groups.nth(number).locator(".badge").all_inner_texts()
        assert badges[0] == "stays" and set(badges[1:]) == {"duplicate caption"}
        texts = groups.nth(number).locator(".caption").all_inner_texts()
        assert len(set(texts)) == 1
    assert page.locator("#examples img").count() == page.locator("#examples li").count()
    assert page.locator("#examples button").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_keyboard_is_enough(table, open_page):
    """Tab reaches slider, number, filters and buttons, with a visible focus; arrows, [ ] and / work."""
    page = open_page(table[0])
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
        if reached[-1] == "slider":
            before = page.input_value("#slider")
            page.keyboard.press("ArrowRight")
            assert int(page.input_value("#slider")) == int(before) + 1
            assert page.get_attribute("#slider", "aria-valuetext").startswith("similarity 0.")
            page.keyboard.press("]")
            page.keyboard.press("[")
            page.keyboard.press("[")
            assert page.input_value("#slider") == before
    assert {"slider", "exact", "status", "rule", "text", "logarithmic", "Show more above"} <= set(reached)
    page.locator("#slider").focus()
    page.keyboard.press("/")
    page.keyboard.type("[x]/")
    assert page.input_value("#text") == "[x]/"
    assert page.inner_text("#found").startswith("0 pairs")


@pytest.mark.slow
def test_plot_moves_the_threshold(table, open_page):
    """A click in the histogram, or a drag, puts the threshold there; logarithmic heights lift what is low."""
    page = open_page(table[0])
    box = page.locator("#plot").bounding_box()
    low, high = (int(page.get_attribute("#slider", name)) for name in ("min", "max"))

    def expected(share):
        return pytest.approx(low + share * (high - low), abs=2)
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 50)
    assert int(page.input_value("#slider")) == expected(0.25)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 60)
    page.mouse.up()
    assert int(page.input_value("#slider")) == expected(0.8)
    assert float(page.get_attribute("#cut", "x1")) == pytest.approx(0.8 * box["width"], abs=2)
    heights = []
    for _ in range(2):
        path = page.get_attribute("#plot .matched", "d")
        heights.append(np.mean([float(point.split()[1]) for point in path.replace("Z", "").split("L")[1:-1]]))
        page.check("#logarithmic")
    assert heights[1] < heights[0] - 10  # y counts downwards


@pytest.mark.slow
def test_captions_are_text(table, open_page):
    """Captions with markup show as they are, everywhere; the page's two script elements stay the only ones."""
    page = open_page(table[0])
    page.fill("#exact", "0.899")
    shown = page.locator("#above .caption").all_text_contents()
    assert set(HOSTILE) <= set(shown)
    page.locator("#failures details").last.evaluate("element => element.open = true")
    assert "<b>a failed one</b>" in page.locator("#failures").inner_text()
    assert page.evaluate("document.scripts.length") == 2
    assert page.locator("main b").count() == 0
    assert page.evaluate("[...document.images].every((image) => image.src.startsWith('data:image/webp'))")


@pytest.mark.slow
def test_policy_stops_what_would_get_through(table, browser):
    """Were markup ever to reach the page, the policy would still run no script of it and fetch nothing: the proof is tried."""
    page, requests, refused = browser.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: refused.append(message.text))
    page.goto(table[0].as_uri())
    page.evaluate("""() => {
      document.body.insertAdjacentHTML("beforeend", '<img src="http://127.0.0.1:9/x.png" onerror="window.hacked = 1">');
      const element = document.createElement("script");
      element.textContent = "window.hacked = 2";
      document.body.append(element);
    }""")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in text for text in refused)
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "colours"), list(itertools.product((360, 1200), ("light", "dark"))))
def test_fits_phone_and_desktop_in_both_colours(table, open_page, width, colours):
    """Nothing is wider than the screen, text stands out from its ground by 4.5 to 1, and the threshold stays in view."""
    page = open_page(table[0], width, 800, colours)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    dark = sum(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")) < 200
    assert dark == (colours == "dark")
    ratios = page.evaluate("""() => {
      const numbers = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
        if (!c.endsWith(", 0)")) return c; } return "rgb(255, 255, 255)"; };
      return [...document.querySelectorAll("p, h1, h2, h3, dd, dt, td, th, label, button, strong, code, .quiet, .badge")]
        .filter((e) => e.textContent.trim() && e.offsetParent).map((e) => {
          const [a, b] = [light(numbers(getComputedStyle(e).color)), light(numbers(ground(e)))];
          return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.slice(0, 30)];
        });
    }""")
    assert len(ratios) > 40
    assert min(ratios)[0] >= 4.5, min(ratios)
    page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
    box = page.locator("#slider").bounding_box()
    assert 0 <= box["y"] < 800


@pytest.mark.slow
def test_a_hundred_thousand_rows(tmp_path, monkeypatch, open_page):
    """With 100,000 rows the page stays small, answers within two seconds, and counts all rows though it shows a sample."""
    similarities = np.random.default_rng(5).normal(0.25, 0.06, 100_000).clip(-1, 1).astype(np.float32)
    write_finished_run(tmp_path / "out", similarities, sources=[f"shape-{n % 200:03d}.png" for n in range(100_000)],
                       random=np.random.default_rng(6).normal(0.1, 0.05, 10_000), partition_rows=20_000)
    path = write_page(tmp_path, monkeypatch)
    assert path.stat().st_size < 10_000_000
    page = open_page(path)
    slider_ms = page.evaluate("""() => {
      const slider = document.getElementById("slider"), begun = performance.now();
      for (let i = 0; i < 10; i++) { slider.value = Number(slider.value) + 7; slider.dispatchEvent(new Event("input")); }
      document.body.offsetHeight;
      return (performance.now() - begun) / 10;
    }""")
    ready_ms = int(page.evaluate("document.documentElement.dataset.readyMs"))
    assert ready_ms + slider_ms < 2000
    threshold = float(page.inner_text("#config-line").split()[1])
    assert verdict(page).startswith(f"{(similarities >= np.float32(threshold)).sum():,} rows stay")
    assert "sample of 2,000" in page.inner_text("#found")
    print(f"ready after {ready_ms} ms, {slider_ms:.1f} ms a step of the slider, {path.stat().st_size / 1e6:.1f} MB")


# ── Marks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def write_known_page(folder, monkeypatch, rows=4000, **keys):
    """A page of a table whose truth is known: (path, similarities, whether each row fits)."""
    rng = np.random.default_rng(11)
    fits = rng.random(rows) < 0.6
    similarities = np.where(fits, rng.normal(0.32, 0.05, rows), rng.normal(0.15, 0.05, rows)).astype(np.float32)
    write_finished_run(folder / "out", similarities, sources=[f"shape-{n % 200:03d}.png" for n in range(rows)])
    return write_page(folder, monkeypatch, **keys), similarities, fits


def mark_next(page, fits, number):
    """Mark `number` of the pairs that the page asks for, by keyboard; returns their rows."""
    rows = []
    for _ in range(number):
        rows.append(page.evaluate("next.row"))
        page.keyboard.press("f" if fits[rows[-1]] else "d")
    return rows


def save(page):
    """Press the button, and return the rows of the file."""
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "labels.csv"
    with open(download.value.path(), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_marking_by_keyboard(tmp_path, monkeypatch, open_page):
    """50 pairs are marked by keys alone, one is taken back, all is there after a reload, and the saved file can be loaded."""
    path, similarities, fits = write_known_page(tmp_path, monkeypatch)
    page = open_page(path)
    assert page.inner_text("#progress") == "No pair is marked yet."
    rows = mark_next(page, fits, 50)
    assert len(set(rows)) == 50
    following = page.evaluate("next.row")
    page.keyboard.press("u")
    assert "51 pairs marked" in page.inner_text("#progress") and "1 unsure; 51 in turn" in page.inner_text("#progress")
    page.keyboard.press("z")
    assert page.evaluate("next.row") == following
    expected = f"50 pairs marked: {fits[rows].sum()} fit, {(~fits[rows]).sum()} do not, 0 unsure; 50 in turn."
    assert page.inner_text("#progress") == expected
    saved = save(page)
    assert [int(mark["row"]) for mark in saved] == rows
    assert [mark["label"] == "fits" for mark in saved] == fits[rows].tolist()
    assert [np.float32(mark["similarity"]) for mark in saved] == similarities[rows].tolist()
    assert all(mark["when"].endswith("Z") for mark in saved)
    page.reload()
    page.wait_for_function("document.documentElement.dataset.readyMs")
    assert page.inner_text("#progress") == expected
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#forget")
    assert page.inner_text("#progress") == "No pair is marked yet."
    text = "row,label,when,similarity\n" + "".join(",".join(mark.values()) + "\n" for mark in saved)
    page.set_input_files("#load", {"name": "labels.csv", "mimeType": "text/csv", "buffer": text.encode()})
    page.wait_for_selector("#loaded:not(:empty)")
    assert page.inner_text("#loaded") == "50 marks loaded."
    assert page.inner_text("#progress") == expected


@pytest.mark.slow
def test_buttons_and_filters_of_marks(table, open_page):
    """On a phone the buttons do what the keys do; cards are marked too, and the filter finds the marked ones."""
    page = open_page(table[0], 390, 800)
    for name in ("Fits", "Does not fit", "Unsure"):
        page.locator(".answers button", has_text=name).first.click()
    assert "1 fit, 1 do not, 1 unsure; 3 in turn" in page.inner_text("#progress")
    page.click("#undo")
    assert "2 pairs marked" in page.inner_text("#progress")
    page.locator("#below .cards li").nth(2).locator("[data-label=unsure]").click()
    assert page.get_attribute("#below .cards li:nth-child(3) [data-label=unsure]", "aria-pressed") == "true"
    page.keyboard.press("d")  # the card has the focus
    assert "2 do not, 0 unsure; 2 in turn" in page.inner_text("#progress")
    page.select_option("#marked", "does_not_fit")
    assert page.inner_text("#found").startswith("2 pairs of the sample")
    page.select_option("#marked", "none")
    assert page.inner_text("#found").startswith("857 pairs of the sample")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_page_and_curate_find_the_same_cut(tmp_path, monkeypatch, open_page, capfd):
    """The page asks in the order that tests simulate, shows the cut that curate.py makes, and that keeps what was promised."""
    from test_labels import cells_of, mark_in_turn, queues_of
    path, similarities, fits = write_known_page(tmp_path, monkeypatch)
    page = open_page(path)
    rows = mark_next(page, fits, 240)
    cells = cells_of(similarities)
    goal = labels.Goal("precision", 0.95)
    assert rows == mark_in_turn(cells, queues_of(similarities, cells), fits, goal, 240).tolist()
    told = page.inner_text("#proof")
    assert told.startswith("Proved: at least 95 % of the ")
    saved = save(page)
    (tmp_path / "labels.csv").write_text(
        "row,label,when,similarity\n" + "".join(",".join(mark.values()) + "\n" for mark in saved))
    capfd.readouterr()
    monkeypatch.setattr(curate, "draw_plots", lambda *_: None)
    assert curate.main(["--config", str(tmp_path / "config.yaml"), "--set", f"curate.labels={tmp_path / 'labels.csv'}",
                        "--set", "curate.min_precision=0.95", "--set", "curate.review=false"]) == 0
    proved = json.loads(capfd.readouterr().out.splitlines()[-1])["labels"]
    assert f"of the {proved['rows_at_or_above']:,} rows at or above {proved['similarity']:.4f} fit" in told
    assert fits[similarities >= proved["similarity"]].mean() >= 0.95
    page.select_option("#goal", "recall")
    page.fill("#share", "90")
    sample = labels.Marks(np.array(rows), fits[rows].astype(np.int8), similarities[rows].astype(float))
    sample = sample.take(np.argsort(review.scatter(sample.rows)))
    found = labels.prove_cut(cells, sample, labels.Goal("recall", 0.9))
    assert page.get_attribute("#proof", "data-kept") == (str(found.kept) if isinstance(found, labels.Proof) else "")
    page.evaluate("""(fits) => {
      for (let i = 0; i < 200; i++) setMark(next, fits[next.row] ? "fits" : "does_not_fit");
    }""", fits.tolist())  # recall asks for all scores
    rows = page.evaluate("[...marks.keys()]")
    in_turn = page.evaluate(
        "collectInTurn().map((labels, i) => queues[i].slice(0, labels.length).map((row) => row.row)).flat()")
    assert len(in_turn) == len(rows) == 440
    order = np.array(in_turn)[np.argsort(review.scatter(np.array(in_turn)))]
    found = labels.prove_cut(cells, labels.Marks(order, fits[order].astype(np.int8), similarities[order].astype(float)),
                             labels.Goal("recall", 0.9))
    assert isinstance(found, labels.Proof)
    assert page.get_attribute("#proof", "data-kept") == str(found.kept)


@pytest.mark.slow
def test_bands_are_weighted(tmp_path, monkeypatch, open_page):
    """With all pairs of the page marked, precision and recall are near the table's, where the plain shares of marks are not;
    their bands are Clopper and Pearson's."""
    path, similarities, fits = write_known_page(tmp_path, monkeypatch, 20_000, review_rows=400)
    page = open_page(path)
    page.evaluate("""(fits) => {
      for (const { row, similarity } of data.sample) {
        marks.set(row, { label: fits[row] ? "fits" : "does_not_fit", when: "", similarity });
      }
      showMarks();
    }""", fits.tolist())
    shown = np.array(page.evaluate("data.sample.map((row) => row.row)"))
    plain_is_far = 0
    for threshold in (0.1, 0.2, 0.24, 0.3):
        bands = page.evaluate("(t) => estimateAt(weighMarks(), 'similarity', t, false)", threshold)
        kept = similarities >= threshold
        truth = {"precision": fits[kept].mean(), "recall": (fits & kept).sum() / fits.sum()}
        for kind, value in truth.items():
            assert bands[kind]["low"] - 0.02 <= value <= bands[kind]["high"] + 0.02, (threshold, kind)
            assert abs(bands[kind]["share"] - value) < 0.07
        plain_is_far += abs(fits[shown[kept[shown]]].mean() - truth["precision"]) > 0.04
        plain_is_far += abs(fits[shown] @ kept[shown] / fits[shown].sum() - truth["recall"]) > 0.1
    assert plain_is_far >= 2
    special = pytest.importorskip("scipy.special")
    for trials, found in ((40, 37), (40, 40), (7, 0), (300, 180)):
        band = page.evaluate("([n, k]) => makeBand(Array(n).fill(2.5), Array.from({ length: n }, (_, i) => i < k))",
                             [trials, found])
        low = special.betaincinv(found, trials - found + 1, 0.025) if found else 0
        high = special.betaincinv(found + 1, trials - found, 0.975) if found < trials else 1
        assert (band["low"], band["high"]) == pytest.approx((low, high), abs=1e-6)
    assert page.locator("#curves path").count() == 4
    assert page.inner_text("#curves-text").startswith("At similarity 0.")


@pytest.mark.slow
def test_loaded_files_of_others(table, open_page):
    """Loading tells what it could not take: other rows, changed scores, lines that are no marks, files that are none."""
    page = open_page(table[0])
    row, similarity = page.evaluate("[data.sample[0].row, data.sample[0].similarity]")

    def load(text):
        page.evaluate("document.getElementById('loaded').textContent = ''")
        page.set_input_files("#load", {"name": "labels.csv", "mimeType": "text/csv", "buffer": text.encode()})
        page.wait_for_selector("#loaded:not(:empty)")
        return page.inner_text("#loaded")
    assert "no labels.csv" in load("url,caption\na,b\n")
    assert "no labels.csv" in load("")
    told = load(f"\ufeffrow,label,when,similarity\r\n{row},fits,,{similarity:.7f}\r\n99999,fits,,0.5\r\n"
                f"{row + 1},fits,,0.01\r\n"
                '7,<img src=x onerror="window.hacked = 1">,,\r\nx,fits,,\r\n')
    assert told.startswith("2 marks loaded, 1 of rows that this page does not show; 1 left out")
    assert "2 lines not understood" in told
    assert "2 pairs marked" in page.inner_text("#progress")


@pytest.mark.slow
def test_proposed_captions_are_text(table, open_page):
    """A hostile caption that the page asks about stands there as text."""
    page = open_page(table[0])
    page.evaluate("""() => {
      for (const row of data.sample) row.caption = "<b>bold</b>";
      showNext();
    }""")
    assert page.text_content("#next-caption") == "<b>bold</b>"
    assert page.locator("#next b").count() == 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_from_the_page_to_a_cut_on_the_drawings(shapes, run_main, tmp_path, monkeypatch, open_page, read_table, capfd):
    """The bundled drawings, scored by the bundled model and marked with their truth on the page: curate.py keeps rows of
    which the share asked for fits."""
    config = shapes(pretrained_model=BUNDLED_MODEL)
    assert run_main("--config", config).code == 0
    monkeypatch.setattr(curate, "draw_plots", lambda *_: None)
    assert curate.main(["--config", str(config), "--set", "curate.review=true"]) == 0
    fits = [row["match"] == "good" for row in read_table(tmp_path / "out/scores.csv")]
    page = open_page(tmp_path / "out/curated/review.html")
    page.fill("#share", "80")
    page.locator("#goal").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    mark_next(page, fits, 150)
    saved = save(page)
    (tmp_path / "labels.csv").write_text(
        "row,label,when,similarity\n" + "".join(",".join(mark.values()) + "\n" for mark in saved))
    assert curate.main(["--config", str(config), "--set", f"curate.labels={tmp_path / 'labels.csv'}",
                        "--set", "curate.min_precision=0.8"]) == 0
    kept = [row["match"] == "good" for row in read_table(tmp_path / "out/curated/kept.csv")]
    assert len(kept) >= 100
    assert np.mean(kept) >= 0.8


@pytest.mark.slow
def test_scores_without_random_pairs(tmp_path, monkeypatch, open_page):
    """A run without random pairs has a page too, which says so and counts all the same."""
    similarities = np.linspace(0, 1, 101, dtype=np.float32)
    write_finished_run(tmp_path / "out", similarities, sources=["shape-000.png"] * 101)
    page = open_page(write_page(tmp_path, monkeypatch, min_similarity=0.5))
    assert verdict(page).startswith("51 rows stay") and "random" not in verdict(page)
    assert "no random pairs" in page.inner_text("#plot-text")
    assert not page.locator("#random-legend").is_visible()


@pytest.mark.slow
@pytest.mark.parametrize("similarities", [[], [math.nan, math.nan]])
def test_page_of_a_table_without_scores(tmp_path, monkeypatch, open_page, similarities):
    """An empty table, or one of failures alone, has a page: nothing stays of nothing."""
    write_finished_run(tmp_path / "out", similarities, statuses=["corrupt"] * len(similarities))
    page = open_page(write_page(tmp_path, monkeypatch))
    assert verdict(page).startswith("0 rows stay, 0 % of 0 scored")
    assert page.locator("#failures summary").count() == bool(similarities)


@pytest.mark.slow
def test_missing_images_are_said(tmp_path, monkeypatch, open_page):
    """A row whose image is gone, or is none, keeps its card."""
    write_finished_run(tmp_path / "out", [0.3, 0.4], sources=["gone.png", "shape-001.png"])
    page = open_page(write_page(tmp_path, monkeypatch))
    assert sorted(page.locator(".cards .plate").all_inner_texts()) == ["", "no image"]


def test_page_without_an_image_folder(tmp_path, monkeypatch):
    """A page needs the images: without their folder it says so before any work, with exit code 3."""
    write_finished_run(tmp_path / "out", [0.3])
    (tmp_path / "c.yaml").write_text(json.dumps({"image_path": str(tmp_path / "none"), "output_path": str(tmp_path / "out"),
                                                 "curate": {"review": True}}))
    with pytest.raises(script.Trouble, match="image_path") as caught:
        curate.main(["--config", str(tmp_path / "c.yaml")])
    assert caught.value.exit_code == 3
