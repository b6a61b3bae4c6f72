"""--plan: what the whole input will cost, from a sample."""
import json
import pathlib

import pytest

import image_text_sim_clip as script

ROOT = pathlib.Path(script.__file__).parent
MODEL = str(ROOT / "challenge_set/shapes_clip")


@pytest.fixture
def drawings(write_config):
    return write_config(csv_path=str(ROOT / "challenge_set/shapes.csv"), image_path=str(ROOT / "challenge_set/shapes"),
                        pretrained_model=MODEL, partition_rows=50)


def test_plan_extrapolates_what_it_measured(drawings, run_main, tmp_path):
    """Hours, partitions and disk are the sample's rate and bytes times the rows; nothing is scored in the output folder."""
    outcome = run_main("--config", drawings, "--plan")
    needs = outcome.result
    assert outcome.code == 0 and needs["rows"] == 600 and needs["partitions"] == 12 and 300 < needs["sampled_rows"] < 600
    assert needs["hours"]["1"] == pytest.approx(600 / needs["pairs_per_s"] / 3600)
    assert needs["hours"]["8"] == pytest.approx(needs["hours"]["1"] / 8)
    assert needs["days_for_100_million_pairs"] == pytest.approx(1e8 / needs["pairs_per_s"] / 86400)
    assert needs["failed_share"] == 0 and needs["limited_by"] in script.STAGES and needs["change_first"]
    assert needs["staged_bytes"] == (tmp_path / "out/pairs.parquet").stat().st_size
    assert list((tmp_path / "out/parts").iterdir()) == []
    for told in ("600 in 12 partitions", "pairs/s", "limited by", "change first"):
        assert told in outcome.stderr


def test_the_run_goes_on_from_the_plan(drawings, run_main, tmp_path):
    """What was staged for --plan is taken over by the run, whose parts then take about the disk that was told."""
    needs = run_main("--config", drawings, "--plan").result
    staged = (tmp_path / "out/pairs.parquet").stat().st_mtime_ns
    assert run_main("--config", drawings).code == 0
    assert (tmp_path / "out/pairs.parquet").stat().st_mtime_ns == staged
    parts = sum(path.stat().st_size for path in (tmp_path / "out/parts").iterdir())
    assert 0.5 < needs["parts_bytes"] / parts < 2


@pytest.mark.parametrize("rows", [1, 5, 13])
def test_plan_of_few_rows(rows, write_config, write_table, run_main):
    """An input smaller than the sample is sampled whole, dry runs and failures included."""
    write_table([["url", "caption"], *([f"none-{i}.png", "c"] for i in range(rows))])
    outcome = run_main("--config", write_config(), "--plan")
    assert outcome.code == 0 and outcome.result["failed_share"] == 1.0
    assert 1 <= outcome.result["sampled_rows"] <= rows


def test_plan_of_no_rows(write_config, write_table, run_main):
    """A table without rows is exit 3 and one line."""
    write_table([["url", "caption"]])
    outcome = run_main("--config", write_config(), "--plan")
    assert outcome.code == 3 and "no rows" in outcome.stderr


def test_plan_then_other_settings(drawings, run_main):
    """After --plan nothing is scored yet, so the run may have other settings."""
    assert run_main("--config", drawings, "--plan").code == 0
    outcome = run_main("--config", drawings, "--set", "preprocess=exact", "--set", "limit=20")
    assert outcome.code == 0 and json.loads(outcome.stdout.splitlines()[-1])["rows"] == 20
