"""Images that were replaced after they had been scored: curation tells, and uses none of them."""
import json
import os
import shutil
import tarfile

import pyarrow.parquet as pq
import pytest
from conftest import BUNDLED_MODEL, ROOT
from test_curation import curated, run_curate  # noqa: F401

import image_text_sim_clip as script
from addons.measures.image_digests import find_column


@pytest.fixture
def scored(tmp_path, run_main, write_config):
    """Twelve captions of four drawings, image names that an image_digest column of the table goes along with, scored."""
    config = write_config(pretrained_model=BUNDLED_MODEL, partition_rows=5)
    pictures = tmp_path / "pictures"
    lines = ["url,caption,image_digest"]
    for number in range(12):
        name = f"shape-{number // 3:03d}.png"
        shutil.copy(ROOT / "challenge_set/shapes" / name, pictures)
        lines.append(f"{name},a large red circle {number},own {number}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    assert run_main("--config", config).result["scored"] == 12
    return config


def exported_keys(folder):
    """The row numbers of the images in an export."""
    names = [path.name for path in folder.rglob("*.png")]
    for path in folder.rglob("*.tar"):
        with tarfile.open(path) as tar:
            names += [name for name in tar.getnames() if name.endswith(".png")]
    return sorted(int(name.removesuffix(".png")) for name in names)


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset"])
def test_a_replaced_image_is_not_exported(scored, run_curate, tmp_path, kind):  # noqa: F811
    """An image that was replaced since is listed, counted and left out; put back, it is exported by the same command."""
    image = tmp_path / "pictures/shape-001.png"
    before = image.read_bytes()
    shutil.copy(ROOT / "challenge_set/shapes/shape-150.png", image)
    outcome = run_curate(scored, export=kind)
    assert outcome.code == 0 and "1 of the images that were read have changed since they were scored" in outcome.stderr
    assert (outcome.result["kept"], outcome.result["exported"], outcome.result["not_exported"]) == (12, 9, 3)
    assert exported_keys(tmp_path / "out/curated" / kind) == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    listed = (tmp_path / "out/curated/not_exported.csv").read_text().splitlines()
    assert listed[1:] == [f"{row},shape-001.png,changed: not the image that was scored" for row in (3, 4, 5)]
    image.write_bytes(before)
    outcome = run_curate(scored, export=kind)
    assert outcome.result["exported"] == 12 and "changed since" not in outcome.stderr
    assert exported_keys(tmp_path / "out/curated" / kind) == list(range(12))


def test_another_time_is_not_another_image(scored, run_curate, tmp_path, write_config):  # noqa: F811
    """A copy of the folder, of today, has the same images."""
    shutil.copytree(tmp_path / "pictures", tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (4e9, 4e9))
    config = write_config("copy.yaml", pretrained_model=BUNDLED_MODEL, partition_rows=5, image_path=str(tmp_path / "copy"))
    outcome = run_curate(config, export="imagefolder")
    assert outcome.result["exported"] == 12 and "warning" not in outcome.stderr


def test_rules_and_page_use_no_replaced_image(scored, run_curate, curated, tmp_path):  # noqa: F811
    """What a rule on images would judge, or the page show, is not there any more."""
    shutil.copy(ROOT / "challenge_set/shapes/shape-150.png", tmp_path / "pictures/shape-001.png")
    outcome = run_curate(scored, min_width=1, review=True)
    assert outcome.result["dropped"] == {"unreadable_image": 3} and "is another one than was scored" in outcome.stderr
    assert set(curated()[1]) == {"shape-001.png"}
    page = (tmp_path / "out/curated/review.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert {row["url"] for row in data["sample"] if row["thumbnail"] is None} == {"shape-001.png"}


def test_digests_stay_in_the_parts(scored, run_main, read_table, tmp_path):
    """The results do not have the column of digests, in CSV and in Parquet; one of the table with its name stays as it is."""
    rows = read_table(tmp_path / "out/scores.csv")
    names = ["url", "caption", "image_digest", *script.column_names(script.RESULT_COLUMNS)]
    assert list(rows[0]) == names and rows[3]["image_digest"] == "own 3"
    part = pq.read_table(tmp_path / "out/parts/part-00001.parquet")
    assert part.column_names == [*names, find_column(part.schema)] and part[find_column(part.schema)].null_count == 0
    outcome = run_main("--config", scored, "--set", "output_format=parquet", "--set", f"output_path={tmp_path}/typed")
    assert outcome.code == 0
    assert pq.read_schema(tmp_path / "typed/scores.parquet").names == names


def test_a_retry_keeps_the_digests(tmp_path, shapes, run_main, run_curate, late):  # noqa: F811
    """Rows that are not tried again keep their image's digest, those that are get one."""
    config = shapes(rows=9, pretrained_model=BUNDLED_MODEL)
    with late("shape-001.png"):
        assert run_main("--config", config).result["failed"] == {"timeout": 3}
    part = tmp_path / "out/parts/part-00000.parquet"
    before = pq.read_table(part)
    column = find_column(before.schema)
    assert before[column].null_count == 3
    assert run_main("--config", config, "--retry-failed").result["scored"] == 9
    after = pq.read_table(part)
    assert after.column_names == before.column_names and after[column].null_count == 0
    assert after[column].to_pylist()[:3] == before[column].to_pylist()[:3]
    assert run_curate(config, export="imagefolder").result["exported"] == 9


@pytest.mark.slow
def test_parts_of_the_script_alone_have_none(scored, run_cli, run_curate, tmp_path):  # noqa: F811
    """A run that a script without add-ons goes on with has one set of columns; its own parts are exported unchecked."""
    expected = (tmp_path / "out/scores.csv").read_text().splitlines()
    (tmp_path / "out/parts/part-00001.parquet").unlink()
    for name in ("profile.json", "scores.csv"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "alone").mkdir()
    shutil.copy(ROOT / "image_text_sim_clip.py", tmp_path / "alone")
    outcome = run_cli("--config", scored, script_path=tmp_path / "alone/image_text_sim_clip.py")
    assert outcome.code == 0, outcome.stderr
    lines = (tmp_path / "out/scores.csv").read_text().splitlines()
    assert lines[0] == expected[0] and {line.count(",") for line in lines} == {expected[0].count(",")}
    assert run_curate(scored, export="imagefolder").result["exported"] == 12
