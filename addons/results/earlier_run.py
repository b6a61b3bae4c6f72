"""An output folder that holds a run which is not quite the one asked for: what differs, in words, and whether it may go on.

The script comes here where its manifest is not that of this very run, or where the model is not the one that the run was begun
with. Nothing that is scored is ever thrown away here: it is refused, or planned anew while nothing is scored. Each run also has
removed here what killed processes left half-written.
"""
import contextlib
import itertools
import json
import pathlib
import time

import psutil

from addons.images.marks import remove_marks
from addons.results.retry import finish_commits
from image_text_sim_clip import (
    EXIT_CONFIG,
    FOLDER_FORMAT,
    HOST,
    STAGED_FILES,
    Config,
    Json,
    Plan,
    Trouble,
    __version__,
    addon,
    describe_staged,
    find_reader,
    fingerprint_of,
    has_parts,
    hash_decisive_files,
    in_store,
    output_disk,
    remove_path,
    say,
    settings_of,
    write_sealed,
)


def refuse_other_format(manifest: Json, output: pathlib.Path) -> None:
    """Raise Trouble (exit 2) for a folder that another version wrote in another format."""
    if manifest.get("format") != FOLDER_FORMAT:
        raise Trouble(EXIT_CONFIG, f"{output} was written by version {manifest.get('version', 'unknown')}, whose parts this "
                                   f"version ({__version__}) does not read: use that version, discard the folder with --fresh, "
                                   "or write elsewhere with --set output_path=...")


def check(manifest: Json | None, config: Config, output: pathlib.Path, staged: dict[str, str]) -> Json | None:
    """The manifest of `output` if it describes this very run; None where another one can be planned without a loss.

    `staged` is what staging has left in `output`; where that is not what had been written, the table is staged again. Raises
    Trouble (exit 2) for another run of which something is scored; exit 3 where there is no input, or its disk or store does not
    let us in: that may pass, and is no reason to discard a run.
    """
    elsewhere = "discard it with --fresh, or write elsewhere with --set output_path=..."
    if manifest is None:
        raise Trouble(EXIT_CONFIG, f"{output} holds parts of a run but no readable manifest.json: {elsewhere}")
    if not has_parts(output) and manifest.get("format") != FOLDER_FORMAT:
        return None
    refuse_other_format(manifest, output)
    differences = [f"{key} was {manifest['settings'].get(key)!r}, now {value!r}"
                   for key, value in json.loads(json.dumps(settings_of(config))).items()
                   if manifest["settings"].get(key) != value]
    reader = find_reader(config.csv_path)
    if reader.kind == manifest["kind"]:
        differences += reader.differences(manifest, config)
    else:
        differences.append(f"the input was {manifest['kind']}, now {reader.kind}")
    if differences and has_parts(output):
        raise Trouble(EXIT_CONFIG, f"{output} holds another run ({'; '.join(differences)}): {elsewhere}")
    if differences:
        return None  # nothing scored yet, so nothing is lost by planning anew
    if "staged" in manifest and manifest["staged"] not in (staged, describe_staged(output)):
        _stage_again(manifest, config, output)
    return manifest


def _stage_again(manifest: Json, config: Config, output: pathlib.Path) -> None:
    """Write what staging writes once more, for a run that goes on; Trouble (exit 2) where the input gives other rows now."""
    say(f"{' and '.join(STAGED_FILES)} in {output} are not what had been written: the table is staged again")
    with output_disk(output):
        for name in STAGED_FILES:
            if (output / name).is_dir():
                remove_path(output / name)
        described = find_reader(config.csv_path).describe(config, output)
    if fingerprint_of(manifest | described) != fingerprint_of(manifest):
        raise Trouble(EXIT_CONFIG, f"{config.csv_path} has changed while it was staged again; run the same command again")
    manifest["staged"] = describe_staged(output)
    write_sealed(output / "manifest.json", manifest)


def go_on_with(plan: Plan, resolved: Json, recorded: Json) -> Json:
    """What the manifest is to keep of `resolved`, which the loaded model tells, for a run that was begun with `recorded`.

    Other libraries are a warning; Trouble (exit 2) where the model or the device is another.
    """
    refuse_other_model(plan.output, resolved, recorded)
    if not recorded or "libraries" not in resolved:
        return resolved
    plan.other_libraries = name_other_libraries(recorded["libraries"], resolved["libraries"])
    return resolved | {"libraries": recorded["libraries"]}  # those of the run's beginning, so that its parts still fit


def name_other_libraries(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Warn where a run goes on with other libraries than it was begun with; returns what differs, in words."""
    differences = [f"{name} was {before.get(name)}, now {now.get(name)}"
                   for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if differences:
        say(f"warning: this run was begun with other libraries ({'; '.join(differences)}): scores may differ a little")
    return differences


def refuse_other_model(output: pathlib.Path, resolved: Json, recorded: Json) -> None:
    """Trouble (exit 2) where a run was begun with another model or device than the one loaded now; changed files by name."""
    differences = name_changed_files(recorded.get("files", {}), resolved.get("files", {}))
    ignored = {"files", "libraries", *(["weights"] if differences else [])}
    differences += [f"{key} was {recorded.get(key)!r}, now {value!r}"
                    for key, value in resolved.items() if key not in ignored and recorded.get(key) != value]
    if differences:
        raise Trouble(EXIT_CONFIG, f"{output} was begun with another model or device ({'; '.join(differences)}): "
                                   "discard it with --fresh, or write elsewhere with --set output_path=...")


def name_changed_files(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What became of the files of a model, given as name -> sha256: one entry for each that is not what it was."""
    words = {(True, True): "has changed", (True, False): "is gone", (False, True): "is new"}
    return [f"{name} {words[name in before, name in now]}" for name in sorted({*before, *now})
            if before.get(name) != now.get(name)]


def refuse_changed_files(plan: Plan, recorded: dict[str, str]) -> None:
    """Trouble (exit 2) where a file of a local model is not what it was when the run was begun, finished or not.

    `recorded` has the sha256 of each by name; those of further models bear the model's name before theirs.
    """
    named = (plan.config.measures or {}).get("further_models", [])
    folders = {"": plan.config.pretrained_model} | {f"{name}/": model for name, model in named[1:]}
    for prefix, model in folders.items():
        if pathlib.Path(model).is_dir():
            digests = {prefix + name: digest for name, digest in hash_decisive_files(pathlib.Path(model)).items()}
            own = {name: digest for name, digest in recorded.items() if name == prefix + name.rpartition("/")[2]}
            refuse_other_model(plan.output, {"files": digests}, {"files": own})


# ── What killed processes left ────────────────────────────────────────────────────────────────────────────────────────────

LEFTOVER_AGE_S = 7 * 86_400  # a file that nobody has written to for so long is nobody's, whatever its name says


def tidy_up(output: pathlib.Path) -> None:
    """Remove what killed processes left half-written, and end what they had begun."""
    remove_leftovers(output)
    finish_commits(output)


def remove_traces(output: pathlib.Path) -> None:
    """Remove, of a run that is finished, what killed processes had left for the case that it goes on."""
    if in_store(output):
        addon("stores.leases", "output_path").remove_probes(output)
    remove_marks((output / "parts").glob("*.trying"))


def remove_leftovers(output: pathlib.Path) -> None:
    """Remove what killed processes left half-written.

    Of those whose number cannot be looked up here nobody knows whether they are at work: theirs stay until they are old. An
    empty one may be a mark that somebody waits for.
    """
    for leftover in itertools.chain((output / "parts").glob(".part-*.tmp"), output.glob(".*.tmp")):
        *_, host, pid, _ = leftover.name.rsplit(".", 3)
        with contextlib.suppress(OSError, ValueError):
            info = leftover.stat()
            is_dead = host == HOST and not psutil.pid_exists(int(pid))
            is_old = info.st_size > 0 and time.time() - info.st_mtime > LEFTOVER_AGE_S
            if is_dead or is_old:
                leftover.unlink()
