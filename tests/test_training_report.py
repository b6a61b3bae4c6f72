"""report.html: what it says of teacher and judge, what it shows, and that nothing in it runs or asks for anything."""
import re

import pytest
from conftest import ROOT  # noqa: F401 - puts the repository on the path

pytest.importorskip("torch")
pytest.importorskip("diffusers", reason="needs examples/requirements.txt")

from PIL import Image

from examples import report
from examples.watching import make_grid

HOSTILE = ["<script>window.hacked = 1</script>", "</style><img src=x onerror=\"window.hacked = 1\">", "<!-- ]]> </body>",
           "' onmouseover='window.hacked=1", "\u202e right to left \u2028", "&lt;b&gt; &amp;", "\ud800 half a pair",
           "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>", "long " * 4000]


def looks_of(**means):
    """A look for each of the means, of four images that lie 0.01 apart."""
    count = len(next(iter(means.values())))
    return [{"step": 50 * i, **{name: [values[i] + 0.01 * k for k in range(4)] for name, values in means.items()}}
            for i in range(count)]


# ── What it says ──────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("means", "begins"), [
    ({"teacher": [0.6, 0.5, 0.4], "judge": [0.6, 0.5, 0.4]}, "Teacher and judge agree: from step 0 to 100"),
    ({"teacher": [0.6, 0.5, 0.4], "judge": [0.6, 0.4, 0.5]}, "Teacher and judge part at step 50: since then the teacher's"),
    ({"teacher": [0.6, 0.5, 0.4], "judge": [0.6, 0.6, 0.6]}, "Teacher and judge part from the start"),
    ({"teacher": [0.6, 0.5, 0.4], "judge": [0.6, 0.7, 0.8]}, "Teacher and judge part at step 0"),
    ({"teacher": [0.6, 0.5, 0.5], "judge": [0.6, 0.4, 0.5]}, "What was learnt after step 50 pleases neither"),
    ({"teacher": [0.6, 0.6, 0.6], "judge": [0.6, 0.5, 0.55]}, "What was learnt after step 50 pleases neither"),
    ({"teacher": [0.6, 0.6, 0.6], "judge": [0.6, 0.6, 0.6]}, "The teacher was not pleased"),
    ({"teacher": [0.6, 0.5]}, "The teacher's dissimilarity of held-out prompts fell by 0.1000. No judge watched"),
    ({"teacher": [0.6], "judge": [0.6]}, "There was only one look")])
def test_verdict_says_where_teacher_and_judge_part(means, begins):
    """In a plain sentence."""
    assert report.tell_verdict(looks_of(**means)).startswith(begins)


def test_change_within_chance_is_called_so():
    """Half the images better, half worse, by much: two standard errors are not exceeded."""
    chance = report.Change.between([0.5] * 4, [0.3, 0.7, 0.3, 0.69])
    sure = report.Change.between([0.5] * 4, [0.3, 0.31, 0.3, 0.29])
    assert (chance.direction, sure.direction) == (0, -1)
    assert "within chance" in str(chance) and str(sure) == "fell by 0.2000"


def test_prompts_that_moved_most_come_first():
    """By the mean of a prompt's images; none that lost is among those that gained."""
    prompts = ["a", "b", "c", "a", "b", "c"]
    gained, lost = report.moved_most(prompts, [0.5] * 6, [0.4, 0.1, 0.9, 0.6, 0.3, 0.5])
    assert [row["prompt"] for row in gained] == ["b"]
    assert [(row["prompt"], round(row["change"], 6)) for row in lost] == [("c", 0.2)]


# ── The page ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def write(folder, prompts, repeats=1, side=24):
    """A report of two looks, with images of one colour each, red before and green after."""
    count = len(prompts) * repeats
    for name, colour in (("before", 180), ("after", 60)):
        images = [Image.new("RGB", (side, side), (colour, 10 * i % 256, 90)) for i in range(count)]
        make_grid(images).save(folder / f"{name}.png")
    looks = [{"step": step, "teacher": [0.6 - step / 500] * count, "diversity": 0.1,
              "judge": [0.6 - step / 400 + 0.001 * i for i in range(count)]} for step in (0, 50, 100)]
    report.write_report(folder, prompts * repeats, looks, {"model": prompts[0], "seed": "0"}, "patience <ended> it")
    return folder / "report.html"


def test_page_holds_all_that_it_promises(tmp_path):
    """Scores over time, the table, both images of each prompt, what moved, diversity, settings, why it stopped."""
    page = write(tmp_path, ["a red circle", "a blue star"], repeats=2).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 * 4
    for part in ("Teacher and judge agree", "<polyline", "0.1000 apart before", "Gained most", "Before and after",
                 "a blue star", "patience &lt;ended&gt; it", "seed"):
        assert part in page


def test_large_images_are_shown_small_and_cut_where_they_lie(tmp_path):
    """The grid has cells of at most 384 px, and each image is found in it again."""
    colours = [(20 * i, 255 - 20 * i, 99) for i in range(10)]
    make_grid([Image.new("RGB", (600, 600), colour) for colour in colours]).save(tmp_path / "grid.png")
    cells = report.cut_cells(tmp_path / "grid.png", 10)
    assert [cell.getpixel((200, 200)) for cell in cells] == colours
    assert {cell.size for cell in cells} == {(384, 384)}
    assert report.cut_cells(tmp_path / "none.png", 10) == []


def test_hostile_prompts_stay_text(tmp_path):
    """No tag of a prompt is one of the page's, and very long ones are cut."""
    page = write(tmp_path, HOSTILE).read_text(encoding="utf-8")
    assert not re.search(r"<script|onerror=\"|<meta http-equiv=refresh|' onmouseover='", page)
    assert "&lt;script&gt;window.hacked" in page
    assert len(page) < 200_000


@pytest.mark.slow  # starts a browser
def test_page_opens_from_disk_without_a_request_or_a_message(browser, tmp_path):
    """With hostile prompts; every image is painted, and nothing is wider than the page, light or dark, large or small."""
    said, requests = [], []
    page = browser.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    path = write(tmp_path, HOSTILE)
    for width, colours in ((1200, "light"), (390, "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=colours)
        page.goto(path.as_uri())
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        assert page.evaluate("document.images.length") == 2 * len(HOSTILE)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate("[...document.querySelectorAll('.moved')].every((each) => each.scrollWidth <= each.clientWidth)")
        assert page.evaluate("document.querySelector('.moved td').clientWidth >= 100")  # words stay whole
        shown = page.evaluate("[...document.querySelectorAll('figcaption bdi')].map((each) => each.textContent)")
        assert shown[:4] == HOSTILE[:4]
        page.screenshot(path=tmp_path / f"{colours}.png", full_page=True)
    page.close()
    assert said == []
    assert [url for url in requests if not url.startswith(("data:", path.as_uri()))] == []
