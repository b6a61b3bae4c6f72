"""The config: one truth for its keys, and one line, soon, for every mistake in it."""
import dataclasses
import json
import math
import pathlib
import resource

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import image_text_sim_clip as script

ROOT = pathlib.Path(script.__file__).parent
HEAVY = {"torch", "transformers", "pandas", "requests", "matplotlib", "numpy", "pyarrow", "huggingface_hub"}


@pytest.fixture
def load(tmp_path):
    """Load a config from YAML text and overrides."""
    def load_text(text="", *overrides):
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return script.load_config(path, overrides)
    return load_text


def refused(load, text, *overrides):
    """The one line that refuses a config."""
    with pytest.raises(script.Trouble) as trouble:
        load(text, *overrides)
    assert trouble.value.exit_code == script.EXIT_CONFIG == 2
    message = str(trouble.value)
    assert message.isprintable() and len(message.splitlines()) == 1
    return message


# ── One truth ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_config_yaml_equals_the_dataclass():
    """config.yaml holds every key of the dataclass, in its order, with its default."""
    written = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    fields = {field.name: field.default for field in dataclasses.fields(script.Config)}
    assert list(written) == list(fields)
    del written["curate"], fields["curate"]  # a section; test_curation.py compares it with its own dataclass
    assert written == fields
    assert {k: type(v) for k, v in written.items()} == {k: type(v) for k, v in fields.items()}


def test_config_yaml_loads_to_the_defaults():
    """Loading config.yaml gives the very Config that no file at all would give, the section of the second job aside."""
    assert dataclasses.replace(script.load_config(ROOT / "config.yaml"), curate=None) == script.Config()


def test_key_of_a_section_can_be_overridden(tmp_path):
    """--set section.key=value changes one key of a section; anywhere else a dot makes an unknown key."""
    path = tmp_path / "c.yaml"
    path.write_text("curate: {keep_fraction: 0.5, review: true}\n")
    assert script.load_config(path, ["curate.keep_fraction=0.25"]).curate == {"keep_fraction": 0.25, "review": True}
    path.write_text("limit: 3\ncurate:\n")
    assert script.load_config(path).curate is None
    assert script.load_config(path, ["curate.export=parquet"]).curate == {"export": "parquet"}
    for override in ("limit.x=1", "nothing.x=1"):
        with pytest.raises(script.Trouble, match="unknown key"):
            script.load_config(path, [override])


def test_every_key_has_a_comment():
    """Each key of config.yaml explains itself in a comment on its own line."""
    for line in (ROOT / "config.yaml").read_text(encoding="utf-8").splitlines():
        assert not line or line.startswith("#") or "  # " in line, line


def test_original_keys_come_first():
    """The four keys of the original work are unchanged and at top level."""
    assert [f.name for f in dataclasses.fields(script.Config)][:4] == ["csv_path", "image_path", "use_cuda", "pretrained_model"]


def test_demo_config_is_valid():
    """demo.yaml loads, and what it names exists in a clone."""
    config = script.load_config(ROOT / "challenge_set/demo.yaml")
    assert (ROOT / config.csv_path).is_file()
    assert (ROOT / config.image_path).is_dir()
    assert (ROOT / config.pretrained_model / "model.safetensors").is_file()
    assert config.use_cuda is False


def test_harmless_keys_exist():
    """A key that may differ between a run and its resumption is a key of the config."""
    assert {f.name for f in dataclasses.fields(script.Config)} >= script.HARMLESS_KEYS


# ── Mistakes ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("typo", "meant"), [("batchsize", "batch_size"), ("caption_colum", "caption_column"),
                                             ("image_dir", "image_path"), ("use_gpu", "use_cuda"), ("Limit", "limit")])
def test_unknown_key_names_the_nearest(load, typo, meant):
    """A misspelt key is refused, with the known key nearest to it."""
    message = refused(load, f"{typo}: 1")
    assert repr(typo) in message
    assert repr(meant) in message


def test_unknown_key_far_from_all_names_none(load):
    """A key that resembles none is refused without a guess."""
    message = refused(load, "zzzz: 1")
    assert "'zzzz'" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("key", ["1", "true", "null", "3.5", "''"])
def test_keys_that_are_no_text(load, key):
    """Keys of YAML's other kinds are unknown keys, not tracebacks."""
    assert "unknown key" in refused(load, f"{key}: 1")


WRONG = [
    ("csv_path", "3"), ("csv_path", "null"), ("csv_path", "[a, b]"), ("csv_path", "true"),
    ("use_cuda", "1"), ("use_cuda", "'yes'"), ("use_cuda", "null"),
    ("pretrained_model", "[a, b]"), ("caption_template", "{}"), ("separator", "1"),
    ("dtype", "float64"), ("dtype", "32"), ("dtype", "null"), ("preprocess", "Fast"), ("decode", "''"), ("engine", "spark"),
    ("limit", "'10'"), ("limit", "1.5"), ("limit", "10.0"), ("limit", "true"), ("limit", "1e3"),
    ("batch_size", "large"), ("batch_size", "null"), ("batch_size", "true"), ("batch_size", "2.0"), ("batch_size", "Auto"),
    ("loader_threads", "false"), ("partition_rows", "[256]"), ("max_image_bytes", "true"), ("max_image_pixels", "5e7"),
    ("fetch_timeout_s", "soon"), ("fetch_timeout_s", "true"), ("fetch_timeout_s", ".nan"), ("fetch_timeout_s", ".inf"),
    ("max_failure_rate", "null"), ("max_failure_rate", "'0.5'"), ("fetch_retries", "1.0"), ("url_column", "2001-01-01"),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_wrong_type(load, key, value):
    """A value of the wrong type is refused with its key and what belongs there; True is no whole number."""
    message = refused(load, f"{key}: {value}")
    assert message.startswith(f"{key} must be ")
    assert f"got {yaml.safe_load(value)!r}" in message


@pytest.mark.parametrize("value", ["verify", "retry", "progress", "xlsx"])
def test_formats_are_what_writes_results(load, value):
    """`output_format` names what writes a kind of results; the other files of addons/results do not."""
    assert refused(load, f"output_format: {value}") == f"output_format must be csv | parquet, got {value!r}"


RANGES = [("limit", 0), ("limit", -1), ("batch_size", 0), ("batch_size", 65537), ("partition_rows", 0),
          ("partition_rows", 10_000_001), ("loader_threads", -1), ("loader_threads", 1025), ("max_image_bytes", 0),
          ("max_image_pixels", 0), ("fetch_timeout_s", 0.0), ("fetch_timeout_s", -1), ("fetch_timeout_s", 3601),
          ("fetch_retries", -1), ("fetch_retries", 101), ("max_failure_rate", -0.001), ("max_failure_rate", 1.001)]


@pytest.mark.parametrize(("key", "value"), RANGES)
def test_out_of_range(load, key, value):
    """A number outside its range is refused with the range."""
    message = refused(load, f"{key}: {value}")
    assert message.startswith(f"{key} must lie in [")
    assert str(value) in message


@pytest.mark.parametrize(("key", "value"), [
    ("limit", 1), ("limit", None), ("batch_size", 1), ("batch_size", 65536), ("batch_size", "auto"), ("partition_rows", 1),
    ("partition_rows", 10_000_000), ("loader_threads", 0), ("loader_threads", 1024), ("max_image_bytes", 1),
    ("fetch_timeout_s", 3600), ("fetch_timeout_s", 1), ("fetch_retries", 0), ("max_failure_rate", 0),
    ("max_failure_rate", 1.0)])
def test_ends_of_ranges_are_in(load, key, value):
    """Both ends of a range are allowed, and a whole number is a number."""
    assert getattr(load(yaml.safe_dump({key: value})), key) == value


def test_duplicate_key(load):
    """A key given twice is refused with its line, instead of silently keeping the last."""
    message = refused(load, "limit: 1\nbatch_size: 2\nlimit: 3\n")
    assert "limit" in message and "twice" in message and "line 3" in message


@pytest.mark.parametrize(("override", "hint"), [
    ("limit", "key=value"), ("", "key=value"), ("=3", "unknown key"), ("limt=3", "'limit'"), ("limit=[", "YAML"),
    ("limit=three", "whole number"), ("limit=0", "lie in"), ("batch_size=yes", "whole number"), ("caption_template={}", "text"),
    ("limit=5=6", "whole number"), ("use_cuda=1", "true | false")])
def test_bad_override(load, override, hint):
    """A bad --set is refused as a bad line of the file would be."""
    assert hint in refused(load, "", override)


@pytest.mark.parametrize("text", ["- csv_path\n", "just text\n", "3\n", "true\n", "[csv_path]\n"])
def test_not_a_mapping(load, text):
    """YAML that holds no keys is refused."""
    assert "key: value" in refused(load, text)


@pytest.mark.parametrize("text", ["[]\n", "false\n", "0\n", "''\n"])
def test_empty_non_mapping(load, text):
    """YAML that holds an empty list, a zero or false is refused as well."""
    assert "key: value" in refused(load, text)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "{}\n", "\ufeff# a BOM\n"])
def test_empty_config_means_the_defaults(load, text):
    """A config without keys is one of defaults."""
    assert load(text) == script.Config()


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\tlimit: 3", "limit: *nowhere", "a: 'b",
                                  "limit: !!python/object/apply:os.getcwd []", "limit: !wrong 3",
                                  b"csv_path: \xff\xfe", b"\x00\x01\x02", "limit: 1\n---\nlimit: 2"])
def test_invalid_yaml(load, text):
    """What is no YAML, or more than plain YAML, is refused in one line."""
    assert "not valid YAML" in refused(load, text)


@pytest.mark.parametrize("text", ["[a]: 1", "{a: 1}: 2", "limit: 2001-99-99", "limit: 0x_", "limit: !!int x",
                                  "limit: !!timestamp x", f"limit: {'9' * 5000}", "[" * 3000])
def test_yaml_that_cannot_be_constructed(load, text):
    """YAML whose values Python cannot make, or keys it cannot hash, is refused in one line, too."""
    refused(load, text)


def test_override_that_cannot_be_constructed(load):
    """A --set whose value Python cannot make is refused in one line, too."""
    refused(load, "", "limit=2001-99-99")


def test_missing_file(tmp_path):
    """A config that is not there, or is a folder, is refused by its name."""
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(script.Trouble, match="cannot read the config") as trouble:
            script.load_config(path)
        assert path.name in str(trouble.value)
        assert trouble.value.exit_code == 2


@pytest.mark.parametrize("template", ["no braces", "", "{} and {}", "{0}", "{caption}", "{ }"])
def test_caption_template_needs_one_pair_of_braces(load, template):
    """caption_template must hold {} exactly once."""
    assert "caption_template" in refused(load, yaml.safe_dump({"caption_template": template}))


@pytest.mark.parametrize("template", ["{}", "a photo of {}", "{} {x}", "100 % {}", "{}{"])
def test_caption_template_with_one_pair(load, template):
    """Anything may surround the braces."""
    assert load(yaml.safe_dump({"caption_template": template})).caption_template == template


def test_separator_is_one_character(load):
    """separator is auto or one character."""
    for good in ("auto", ";", "\t", "|", " ", "é"):
        assert load(yaml.safe_dump({"separator": good})).separator == good
    for bad in ("", ";;", "tab"):
        assert "separator" in refused(load, yaml.safe_dump({"separator": bad}))


@pytest.mark.parametrize("separator", ['"', "\n", "\r"])
def test_separator_that_cannot_separate(load, separator):
    """A quote or a line end is no separator."""
    assert "separator" in refused(load, yaml.safe_dump({"separator": separator}))


@pytest.mark.parametrize("encoding", ["utf-99", "rot13", "base64", "mbcs", ""])
def test_unknown_encoding(load, encoding):
    """An encoding that Python does not know as one of text is refused."""
    assert "encoding" in refused(load, yaml.safe_dump({"encoding": encoding}))


@pytest.mark.parametrize("encoding", ["undefined", "a\0b"])
def test_odd_encoding(load, encoding):
    """The encodings that Python fails on in other ways are refused as well."""
    assert "encoding" in refused(load, yaml.safe_dump({"encoding": encoding}))


def test_transparent_over_is_a_colour(load):
    """transparent_over takes names and codes, and nothing else."""
    for good in ("white", "#f80", "#ff8800", "rgb(1, 2, 3)"):
        assert load(yaml.safe_dump({"transparent_over": good})).transparent_over == good
    for bad in ("", "whit", "#ggg", "1,2,3"):
        assert "transparent_over" in refused(load, yaml.safe_dump({"transparent_over": bad}))


# ── Overrides ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_override_wins(load):
    """--set beats the file, the later one beats the earlier, and its value is YAML."""
    config = load("limit: 1\nbatch_size: 2\n", "limit=3", "use_cuda=false", "caption_template='a {}'", " dtype = float16",
                  "limit=4")
    assert (config.limit, config.batch_size, config.use_cuda, config.caption_template, config.dtype) \
        == (4, 2, False, "a {}", "float16")


def test_override_may_hold_an_equals_sign(load):
    """Only the first = of a --set divides."""
    assert load("", "user_agent=a=b").user_agent == "a=b"


def test_override_to_null(load):
    """--set limit= and limit=null take a limit away."""
    assert load("limit: 3", "limit=").limit is None
    assert load("limit: 3", "limit=null").limit is None


@given(st.sampled_from([f.name for f in dataclasses.fields(script.Config)]),
       st.one_of(st.none(), st.booleans(), st.integers(-2, 70000), st.floats(), st.text(max_size=9), st.lists(st.integers())))
@settings(max_examples=200, deadline=None)
def test_any_value_is_taken_or_refused(key, value):
    """Any value for any key gives a Config that holds it, or Trouble that names the key; never anything else."""
    try:
        config = script.Config(**{key: value})
    except script.Trouble as trouble:
        assert key in str(trouble) and trouble.exit_code == 2
    else:
        assert getattr(config, key) == value
        assert not (isinstance(value, float) and not math.isfinite(value))


# ── As a command ──────────────────────────────────────────────────────────────────────────────────────────────────────

def imported(stderr):
    """The top-level packages in an -X importtime log, and the lines of stderr that are none of it."""
    lines = stderr.splitlines()
    log = [line for line in lines if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in log}, [x for x in lines if x not in set(log)]


@pytest.mark.parametrize("case", ["unknown key", "wrong type", "out of range", "duplicate key", "bad override", "missing file",
                                  "not a mapping", "invalid YAML", "no arguments", "unknown option"])
def test_mistakes_are_answered_at_once(run_cli, tmp_path, case):
    """A mistake in the config ends with exit 2, one line and nothing on stdout, in under a second, before heavy imports."""
    text = {"unknown key": "batchsize: 3", "wrong type": "limit: x", "out of range": "limit: 0", "not a mapping": "- 3",
            "duplicate key": "limit: 3\nlimit: 4", "invalid YAML": "a: [\n  b: 'c\n"}.get(case, "")
    path = tmp_path / "config.yaml"
    path.write_text(text)
    arguments = {"bad override": ["--config", path, "--set", "limit"], "missing file": ["--config", "nowhere.yaml"],
                 "no arguments": [], "unknown option": ["--config", path, "--fast"]}.get(case, ["--config", path])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    outcome = run_cli(*arguments, interpreter=("-X", "importtime"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # which a busy machine does not lengthen
    packages, said = imported(outcome.stderr)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert len(said) == 1 and said[0].startswith("error: "), said
    assert "yaml" in packages and not packages & HEAVY
    assert cpu_s < 1


def test_overrides_reach_the_run(run_cli, write_config, write_table):
    """--set, given more than once on the command line, changes the run."""
    write_table("url,caption\n" + "a.png,x\n" * 5)
    outcome = run_cli("--config", write_config(), "--set", "limit=3", "--set", "output_path=elsewhere")
    assert outcome.code == 0, outcome.stderr
    assert outcome.result["rows"] == 3
    assert outcome.result["output"] == "elsewhere/scores.csv"


def test_help_and_version(run_cli):
    """--help names the exit codes, --version the version; both end with 0."""
    shown = run_cli("--help")
    assert shown.code == 0 and "exit codes" in shown.stdout
    assert run_cli("--version").stdout.strip() == script.__version__


def test_dry_run_needs_no_torch(run_cli, write_config, write_table):
    """`pretrained_model: none` runs to its end without importing torch or transformers."""
    write_table("url,caption\na.png,x\n")
    outcome = run_cli("--config", write_config(), interpreter=("-X", "importtime"))
    packages, _ = imported(outcome.stderr)
    assert outcome.code == 0
    assert "pyarrow" in packages and not packages & {"torch", "transformers", "requests", "huggingface_hub"}


@pytest.mark.parametrize("missing", ["yaml", "PIL"])
def test_missing_package_is_one_line(run_cli, write_config, tmp_path, missing):
    """A Python without the requirements (no environment is active) is exit 2 in one line with the package and the cure."""
    packages = tmp_path / "packages"
    packages.mkdir()
    if missing != "yaml":
        (packages / "yaml").symlink_to(pathlib.Path(yaml.__file__).parent)
    outcome = run_cli("--config", write_config(), interpreter=("-S",), env={"PYTHONPATH": str(packages)})
    assert outcome.code == 2 and len(outcome.stderr.splitlines()) == 1
    assert f"the package {missing} is missing: pip install -r requirements.txt" in outcome.stderr


@pytest.mark.parametrize(("override", "words"), [("csv_path=*.csv", "csv_path=\"...\""), (r"separator=\t", r'"\t"')])
def test_values_that_need_quotes(run_main, write_config, override, words):
    """A --set that YAML cannot read, and a tab that is none, are refused with how to write them."""
    outcome = run_main("--config", write_config(), "--set", override)
    assert outcome.code == 2 and len(outcome.stderr.splitlines()) == 1 and words in outcome.stderr


def test_stdout_of_another_encoding(run_cli, write_config, write_table, tmp_path):
    """The last line is ASCII, so that a stdout of any encoding takes it; it reads back as what it says."""
    write_table("url,caption\na.png,x\n")
    outcome = run_cli("--config", write_config(output_path=str(tmp_path / "é")), env={"PYTHONIOENCODING": "ascii"})
    assert outcome.code == 0 and json.loads(outcome.stdout)["output"].endswith("é/scores.csv")


def test_python_that_looks_nowhere_else(run_cli, write_config, write_table):
    """PYTHONSAFEPATH keeps a script's folder off the path; the script finds itself and its add-ons all the same."""
    write_table("url,caption\na.png,x\n")
    assert run_cli("--config", write_config(), env={"PYTHONSAFEPATH": "1"}).code == 0


def test_last_line_is_json(run_cli, write_config, write_table):
    """The last line on stdout is one JSON object with the promised keys; all talk is on stderr."""
    write_table("url,caption\na.png,x\n")
    outcome = run_cli("--config", write_config())
    assert list(json.loads(outcome.stdout)) == [
        "rows", "scored", "failed", "malformed", "pairs_per_s", "mean_similarity", "output"]
    assert "pairs" in outcome.stderr

